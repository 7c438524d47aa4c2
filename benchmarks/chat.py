"""What several columns of a chat cost: the studio's one batch beside `transformers` and PEFT, and many streams at once.

    python benchmarks/chat.py [--rounds 5] [--tokens 48] [--quick] [--serve] [--memory]

The starter model on the CPU in the number format that the studio picks, LoRA of rank 16 on all linear layers, a prompt
of some forty tokens, greedy answers of a fixed length. All ways take turns in every round (A B C A B C), in one process
and on the same threads; a way's figure is the median over the rounds of its time divided by that of the same round's
reference: one column of the base alone, decoded by the studio. The studio's are measured as the model server runs them,
through its scheduler; `transformers` generates for one model after the other, as a page without batches does, and PEFT
mixes base and adapters in one batch (`adapter_names`). `--serve` asks `transformers serve` and the studio's server over
HTTP; `--memory` asks the studio's server 500 times and looks at its memory. Writes benchmarks/results/chat.md.
"""

import argparse
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio import chat_client, jobs  # noqa: E402
from studio.chat_client import Connection  # noqa: E402
from studio.engine import devices  # noqa: E402
from studio.engine.chat import prompt_ids  # noqa: E402
from studio.engine.generate import Sampling  # noqa: E402
from studio.engine.scheduler import Ask, Piece, Scheduler  # noqa: E402
from studio.engine.served import ModelPool  # noqa: E402
from studio.models import require  # noqa: E402
from studio.paths import atomic_write_text  # noqa: E402
from studio.projects import create_project  # noqa: E402

RESULT = Path(__file__).parent / "results" / "chat.md"
BASE, NUM_ADAPTERS, RANK = "starter", 3, 16
QUESTION = [{"role": "user", "content": "Explain in a few sentences why the sky is blue and the evening sky is red."}]
REFERENCE = "studio, base alone"
NUM_REQUESTS = 500
SERVE_NEEDS = "'transformers[serving]'"
QUICK_LEAVES_OUT = ("transformers generate, 4", "PEFT mixed batch, 4", "4 streams")


def main() -> None:
    options = _options()
    devices.set_threads()
    device = devices.pick_device()
    dtype = devices.pick_dtype("auto", device)
    with tempfile.TemporaryDirectory(prefix="retune-chat-") as scratch:
        adapters = make_adapters(Path(scratch), dtype)
        lines = [*_columns(options, adapters, dtype, device), *_over_http(options, adapters, Path(scratch))]
    text = "\n".join([*_head(options, dtype), *lines, "", f"Machine: {_machine()}"]) + "\n"
    atomic_write_text(RESULT, text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--quick", action="store_true", help="one column and two, and the peers' two")
    parser.add_argument("--serve", action="store_true", help="over HTTP, beside `transformers serve`")
    parser.add_argument("--memory", action="store_true", help=f"{NUM_REQUESTS} requests to the studio's server")
    return parser.parse_args()


def make_adapters(folder: Path, dtype: torch.dtype) -> list[Path]:
    """Adapters that change the answers a little: their B matrices are small random numbers."""
    model = AutoModelForCausalLM.from_pretrained(str(require(BASE)), dtype=dtype)
    found = []
    for number in range(NUM_ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter = get_peft_model(model, config)
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.005)
        found.append(folder / f"adapter-{number}")
        adapter.save_pretrained(found[-1])
        model = adapter.unload()
    return found


class Studio:
    """The studio's model server without HTTP: its pool and its scheduler."""

    def __init__(self, adapters: Sequence[Path], dtype: torch.dtype, device: torch.device, num_tokens: int) -> None:
        self.pool = ModelPool(BASE, require(BASE), dtype, device)
        self.names = [BASE, *(self.pool.add(path.name, path).name for path in adapters)]
        self.prompt = prompt_ids(self.pool.ready(self.pool.find(BASE)).loaded, QUESTION)
        self._scheduler = Scheduler(self.pool)
        self._scheduler.start()
        self._num_tokens = num_tokens

    def ask(self, names: Sequence[str]) -> int:
        """Ask all at once and wait for the last word; returns the number of tokens."""
        news: queue.Queue[Piece] = queue.Queue()
        sampling = Sampling(self._num_tokens)
        asks = [Ask(self.pool.find(name), list(self.prompt), sampling, news.put) for name in names]
        self._scheduler.ask(*asks)
        num_tokens, num_open = 0, len(asks)
        while num_open:
            piece = news.get()
            num_open -= bool(piece.finish_reason)
            num_tokens += piece.num_tokens
        return num_tokens


class Peft:
    """transformers and PEFT as they are."""

    def __init__(self, adapters: Sequence[Path], dtype: torch.dtype, prompt: list[int], num_tokens: int) -> None:
        base = AutoModelForCausalLM.from_pretrained(str(require(BASE)), dtype=dtype).eval()
        self._bare = AutoModelForCausalLM.from_pretrained(str(require(BASE)), dtype=dtype).eval()
        self._model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="a0")
        for number, path in enumerate(adapters[1:], start=1):
            self._model.load_adapter(str(path), adapter_name=f"a{number}")
        self._model.eval()
        self._prompt, self._num_tokens = prompt, num_tokens

    def one_after_the_other(self, num_columns: int) -> int:
        self._generate(self._bare, 1)
        for number in range(num_columns - 1):
            self._model.set_adapter(f"a{number}")
            self._generate(self._model, 1)
        return num_columns * self._num_tokens

    def mixed(self, num_columns: int) -> int:
        names = ["__base__", *(f"a{number}" for number in range(num_columns - 1))]
        self._generate(self._model, num_columns, adapter_names=names)
        return num_columns * self._num_tokens

    def _generate(self, model: Any, rows: int, **more: Any) -> None:
        ids = torch.tensor([self._prompt] * rows)
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=self._num_tokens, max_new_tokens=self._num_tokens, **more
            )  # fmt: skip


def _columns(
    options: argparse.Namespace, adapters: Sequence[Path], dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    studio = Studio(adapters, dtype, device, options.tokens)
    _never_end(studio.pool)
    peft = Peft(adapters, dtype, list(studio.prompt), options.tokens)
    ways: dict[str, Callable[[], int]] = {
        REFERENCE: lambda: studio.ask(studio.names[:1]),
        "studio, one adapter alone": lambda: studio.ask(studio.names[1:2]),
        "studio, 2 columns: base and adapter": lambda: studio.ask(studio.names[:2]),
        "studio, 4 columns: base and 3 adapters": lambda: studio.ask(studio.names[:4]),
        "transformers generate, base alone": lambda: peft.one_after_the_other(1),
        "transformers generate, 2 columns one after the other": lambda: peft.one_after_the_other(2),
        "transformers generate, 4 columns one after the other": lambda: peft.one_after_the_other(4),
        "PEFT mixed batch, 2 columns": lambda: peft.mixed(2),
        "PEFT mixed batch, 4 columns": lambda: peft.mixed(4),
        "studio, 4 streams of the base": lambda: studio.ask([BASE] * 4),
        "studio, 16 streams of the base": lambda: studio.ask([BASE] * 16),
    }
    if options.quick:
        ways = {name: way for name, way in ways.items() if not any(many in name for many in QUICK_LEAVES_OUT)}
    wall, cpu, tokens = _measure(ways, options.rounds)
    yield from [
        "| way | time / one column | CPU time / one column | tokens per second, all columns |",
        "| --- " * 4 + "|",
    ]
    for name in ways:
        ratio, cpu_ratio = _ratio(wall, name), _ratio(cpu, name)
        rate = median(tokens[name] / seconds for seconds in wall[name])
        yield f"| {name} | {ratio} | {cpu_ratio} | {rate:.1f} |"


def _never_end(pool: ModelPool) -> None:
    """Every answer has the full length: no token ends it."""
    for name in [each.name for each in pool.listed()]:
        pool.ready(pool.find(name)).loaded.eos_ids.clear()


def _measure(
    ways: dict[str, Callable[[], int]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """(wall seconds, processor seconds, tokens) by way, after one round that warms all of them up."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            tokens[name] = way()
            if number:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return wall, cpu, tokens


def _ratio(seconds: dict[str, list[float]], name: str) -> str:
    """The median over the rounds, and the least and the most."""
    ratios = [mine / reference for mine, reference in zip(seconds[name], seconds[REFERENCE], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _over_http(options: argparse.Namespace, adapters: Sequence[Path], scratch: Path) -> Iterator[str]:
    yield from ["", "## Over HTTP", ""]
    if not (options.serve or options.memory):
        yield "`transformers serve` and memory over many requests: not measured (`--serve`, `--memory`)."
        return
    os.environ["RETUNE_HOME"] = str(scratch / "home")
    with _studio_server(adapters) as (connection, process):
        if options.serve:
            yield from _beside_transformers_serve(connection, options)
        if options.memory:
            yield from _memory(connection, process)


@contextmanager
def _studio_server(adapters: Sequence[Path]) -> Iterator[tuple[Connection, psutil.Process]]:
    project = create_project("Benchmark")
    args = {"base": BASE, "adapters": [{"name": path.name, "path": str(path)} for path in adapters], "port": 0}
    job = jobs.start(project.folder, "serve", args, needs_device=False)
    try:
        connection = chat_client.wait_until_ready(project.folder, job, 300)
        yield connection, psutil.Process(jobs.get(project.folder, job.id).pid)
    finally:
        jobs.kill(project.folder, job.id)


def _beside_transformers_serve(connection: Connection, options: argparse.Namespace) -> Iterator[str]:
    """One request after the other to each, with the same body."""
    program, model = Path(sys.executable).parent / "transformers", str(require(BASE))
    if not program.is_file():
        yield f"`transformers serve`: not measured ({program} is not there; install {SERVE_NEEDS} beside this Python)."
        return
    command = [str(program), "serve", model, "--port", "8719", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for("http://127.0.0.1:8719/v1/models", process)
        ratios = []
        for _ in range(options.rounds + 1):
            ours = _ask_http(f"{connection.url}/v1", BASE, options.tokens, connection.token)
            theirs = _ask_http("http://127.0.0.1:8719/v1", model, options.tokens, "")
            ratios.append(theirs / ours)
        yield f"`transformers serve`, one request, time against the studio's server: {median(ratios[1:]):.2f} times."
    except (RuntimeError, httpx.HTTPError, KeyError) as error:
        yield f"`transformers serve`: not measured ({type(error).__name__}: {str(error)[:200]})."
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode}")
        try:
            httpx.get(url, timeout=2)
            return
        except httpx.HTTPError:
            time.sleep(1)
    raise RuntimeError("it did not answer in time")


def _ask_http(url: str, model: str, num_tokens: int, token: str) -> float:
    """Seconds of a whole answer, by the number of tokens that it had."""
    body = {"model": model, "messages": QUESTION, "max_tokens": num_tokens, "temperature": 0}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    began = time.perf_counter()
    response = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=300)
    seconds = time.perf_counter() - began
    return seconds / max(1, int(response.raise_for_status().json()["usage"]["completion_tokens"]))


def _memory(connection: Connection, process: psutil.Process) -> Iterator[str]:
    """Resident memory after 50 requests and after all, with four at a time of different lengths."""
    sampling = chat_client.Sampling(4)
    seen: list[float] = []
    for number in range(0, NUM_REQUESTS, 4):
        asked = [
            chat_client.Column(name, [{"role": "user", "content": "word " * (1 + (number + place) % 40)}])
            for place, name in enumerate(chat_client.list_models(connection)[:4])
        ]
        for _ in chat_client.stream_compare(connection, asked, sampling):
            pass
        seen.append(process.memory_info().rss / 2**20)
    early, late = seen[len(seen) // 10], seen[-1]
    yield (
        f"Memory of the studio's server: {early:.0f} MiB after {NUM_REQUESTS // 10} requests, {late:.0f} MiB after "
        f"{NUM_REQUESTS}, at most {max(seen):.0f} MiB."
    )


def _head(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    return [
        "# Columns of a chat, and many streams",
        "",
        f"`python benchmarks/chat.py {' '.join(sys.argv[1:])}`: {BASE}, {options.rounds} rounds, "
        f"{str(dtype).removeprefix('torch.')}, LoRA of rank {RANK} on all linear layers, {options.tokens} tokens each.",
        "Times are medians (least to most) of ratios within a round to one column of the base alone, decoded by the",
        "studio; prompts are read anew in all of them. Processor time counts what the process computed, whatever else",
        "the machine did. Streams are columns that ask the same model.",
        "",
    ]


def _machine() -> str:
    cores, load = psutil.cpu_count(logical=False), os.getloadavg()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    used = f"{torch.get_num_threads()} threads, load at the end {load[0]:.1f}"
    return f"{platform.machine()}, {cores} cores, {versions}, {used}"


if __name__ == "__main__":
    main()
