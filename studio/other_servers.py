"""Command lines of other tools' servers for a base with adapters: what one copies to where a GPU and the tool are."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from studio.models import resolve

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServerLine:
    """`command`: for a shell. `installed`: whether the tool is on this machine."""

    tool: str
    command: str
    installed: bool


def server_lines(base: str, adapters: Mapping[str, Path], port: int) -> list[ServerLine]:
    """vLLM's and LMDeploy's servers of a base and adapters (name: folder), on this machine's own address."""
    found = resolve(base)
    model = found.id if found.kind == "huggingface" else str(found.folder)
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    vllm = ["vllm", "serve", model, "--host", HOST, "--port", str(port)]
    vllm += ["--enable-lora", "--max-loras", str(len(named)), "--lora-modules", *named] if named else []
    lmdeploy = ["lmdeploy", "serve", "api_server", model, "--server-name", HOST, "--server-port", str(port)]
    lmdeploy += ["--adapters", *named] if named else []
    return [_line("vLLM", vllm), _line("LMDeploy", lmdeploy)]


def _line(tool: str, command: list[str]) -> ServerLine:
    program = command[0]
    return ServerLine(tool, shlex.join(command), bool(shutil.which(program) or find_spec(program)))
