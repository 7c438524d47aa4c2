"""Command lines of other tools' servers for a base with adapters: what one copies to where a GPU and the tool are."""

import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from studio.data.template import CHAT_TEMPLATE_FILE
from studio.models import resolve
from studio.weight_folders import ADAPTER_CONFIG, json_object

HOST, PORT = "127.0.0.1", 8000
DEFAULT_RANK, RANKS = 16, (32, 64, 128, 256, 320, 512)
"""The largest rank that vLLM takes by itself, and those that it can be told of (its LoRAConfig.max_lora_rank)."""


@dataclass(frozen=True)
class Use:
    """How another tool is told to run a model: `command` is for a shell."""

    tool: str
    command: str
    is_installed: bool


def server_lines(base: str, adapters: Mapping[str, Path], port: int = PORT) -> list[Use]:
    """vLLM's and LMDeploy's servers of a base and adapters (name: folder), on this machine's own address."""
    found = resolve(base)
    model = found.id if found.kind == "huggingface" else str(found.folder)
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    vllm = ["vllm", "serve", model, "--host", HOST, "--port", str(port)]
    vllm += ["--enable-lora", "--max-loras", str(len(named)), "--lora-modules", *named] if named else []
    vllm += [*_rank(adapters), *_template(found.folder, adapters)]
    lmdeploy = ["lmdeploy", "serve", "api_server", model, "--server-name", HOST, "--server-port", str(port)]
    lmdeploy += ["--backend", "pytorch", "--adapters", *named] if named else []  # its other one leaves adapters out
    return [use("vLLM", vllm), use("LMDeploy", lmdeploy)]


def use(tool: str, command: list[str], program: str = "") -> Use:
    program = program or command[0]
    return Use(tool, shlex.join(command), bool(shutil.which(program) or find_spec(program)))


def _rank(adapters: Mapping[str, Path]) -> Iterator[str]:
    """vLLM refuses an adapter of a higher rank than it was told of."""
    highest = max((rank_of(folder) for folder in adapters.values()), default=0)
    if highest > DEFAULT_RANK:
        yield from ("--max-lora-rank", str(next((rank for rank in RANKS if rank >= highest), highest)))


def rank_of(folder: Path) -> int:
    """The highest rank of an adapter's layers; 0 for a folder that names none, or is not there yet."""
    config = json_object(folder / ADAPTER_CONFIG)
    own = config.get("rank_pattern")
    ranks = [config.get("r"), *(own.values() if isinstance(own, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def _template(base: Path, adapters: Mapping[str, Path]) -> Iterator[str]:
    """vLLM speaks to adapters by the base's template; one that was trained with another brings its own."""
    own = _text(base / CHAT_TEMPLATE_FILE)
    files = (folder / CHAT_TEMPLATE_FILE for folder in adapters.values())
    other = next((file for file in files if _text(file) not in ("", own)), None)
    if other:
        yield from ("--chat-template", str(other))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
