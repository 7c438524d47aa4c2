"""kernels.cpp: built once for this processor, kept for all projects, and called where a step's numbers are its kind.

Everything it computes has a twin in Python, which counts where it cannot be built, or does not fit. While it is loaded,
tensors live where arena.h puts them.
"""

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from studio.engine.parts import Gradients, Heads, Linears, Rest
from studio.paths import atomic_path, cache_folder

SOURCES = [Path(__file__).parent / name for name in ("kernels.cpp", "arena.h", "attention.h", "numbers.h", "tiles.h")]
# No -ffast-math: what is not a number has to stay none.
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fPIC", "-w"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
COMPILER_SECONDS = 300  # many times what it takes; one that hangs would hold up the run for ever
DTYPES = (torch.bfloat16, torch.float32)

now: Any = None  # what kernels.cpp has, while it is in use


def use(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """Let layers, attention and loss be computed by kernels.cpp from here on where that fits, or no longer.

    `wanted` is a config's train.compile. Returns why they are not: "" where they are.
    """
    global now
    now, why = None, _why_not(wanted, dtype, device)
    if not why:
        why = _load()
    if not why:
        now = torch.classes.retune
        torch.ops.retune.use_arena()
    return why


def _why_not(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    if wanted == "off":
        return "train.compile is off"
    if device.type != "cpu":
        return "on a GPU only where train.compile is on"
    return "" if dtype in DTYPES else f"only for bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"


@cache
def _load() -> str:
    """Once in a process; why it failed, else ""."""
    try:
        library = _path()
        if not library.exists():
            _build(library)
        torch.ops.load_library(library)
        return ""
    except Exception as error:  # a compiler that is missing or fails, a full disk, in whatever way
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _path() -> Path:
    """Of the built library: another for other code, another PyTorch and another processor."""
    sources = [each.read_text(encoding="utf-8") for each in SOURCES]
    parts = [*sources, *FLAGS, torch.__version__, str(torch.cpu.get_capabilities())]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "extensions" / f"kernels-{digest}.so"


def _build(library: Path) -> None:
    """One process compiles, others wait for it, or for its end; the file takes its place when it is whole.

    The compiler is called as it is: torch's own way to build needs ninja, which few machines have.
    """
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no C++ compiler ({compiler})")
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not library.exists():
            print("Compiling layers for this processor, once: some 20 seconds", flush=True)
            with atomic_path(library) as whole:
                _compile(compiler, whole)


def _compile(compiler: str, library: Path) -> None:
    """Linked without -fopenmp: its functions are those that torch has loaded, so that both share their threads."""
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder / each}" for each in ("include", "include/torch/csrc/api/include")]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "kernels.o")
        _call(compiler, *FLAGS, *includes, "-c", SOURCES[0], "-o", part)
        _call(compiler, "-shared", part, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", library)


def _call(*words: str | Path) -> None:
    """Raises RuntimeError with the first error that the compiler tells, or where it does not come to an end."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, errors="replace", start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=COMPILER_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{words[0]} was not done after {COMPILER_SECONDS} seconds") from None
        finally:
            if process.returncode is None:  # with all that it started: they hold its output open
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        told = [line for line in said.splitlines() if "error" in line] or [f"it ended with {process.returncode}"]
        raise RuntimeError(f"{words[0]} failed: {told[0].strip()}")


class CompiledHeads:
    """Stands for parts.Heads. `with_rest`: the whole layer, as kernels.cpp has it."""

    with_rest: Any

    def __init__(self, heads: Heads) -> None:
        self.lora = heads.lora
        self.own = now.Heads(_compiled(heads.linears), heads.norm.weight, heads.norm.epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, lora: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        query, key, value, *kept = self.own.forward(x, cos, sin, list(lora))
        return (query, key, value), tuple(kept)

    def backward(self, query: Tensor, key: Tensor, value: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        d_x, *d_lora = self.own.backward(query, key, value, list(kept), below)
        return [d_x if below else None, None, None], d_lora


class CompiledRest:
    """Stands for parts.Rest."""

    def __init__(self, rest: Rest) -> None:
        self.lora = rest.lora
        layers = [_compiled(each) for each in (rest.out, rest.mlp.wide, rest.mlp.down)]
        self.own = now.Rest(*layers, rest.norm.weight, rest.norm.epsilon)

    def forward(self, x: Tensor, attended: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, *kept = self.own.forward(x, attended, list(lora))
        return out, tuple(kept)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], _: bool) -> Gradients:
        d_x, d_attended, *d_lora = self.own.backward(gradient, list(kept))
        return [d_x, d_attended], d_lora


class CompiledLayer:
    """Both halves, and between them attention over the blocks of a row: one node of the graph instead of three.

    `blocks` are kernels.cpp's; `keeps` says whether probabilities are kept for the way back.
    """

    def __init__(self, heads: CompiledHeads, rest: CompiledRest, blocks: Any, keeps: bool) -> None:
        self.lora = [*heads.lora, *rest.lora]
        self._own, self._blocks, self._keeps = heads.with_rest, blocks, keeps

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, *kept = self._own.forward(x, cos, sin, self._blocks, self._keeps, list(lora))
        return out, tuple(kept)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        d_x, *d_lora = self._own.backward(gradient, self._blocks, list(kept), below)
        return [d_x if below else None, None, None], d_lora


def halves(heads: Heads, rest: Rest) -> tuple[CompiledHeads, CompiledRest] | None:
    """A layer's halves by kernels.cpp; None where it is not in use, or for other weights."""
    linears = [heads.linears, rest.out, rest.mlp.wide, rest.mlp.down]
    if now is None or any(each.whole is None for each in linears):
        return None
    frozen = [*(each.whole for each in linears), heads.norm.weight, rest.norm.weight]
    alike = {each.dtype for each in frozen} in ({dtype} for dtype in DTYPES)
    learned = [*heads.lora, *rest.lora]
    if not alike or any(each.dtype != torch.float32 or not each.is_contiguous() for each in learned):
        return None
    first, second = CompiledHeads(heads), CompiledRest(rest)
    first.with_rest = now.Layer(first.own, second.own)  # here: it costs a good part of what a short row does
    return first, second


def clips(gradients: Sequence[Tensor]) -> bool:
    """Whether kernels.cpp is in use, and `torch.ops.retune.clip` takes these."""
    return now is not None and all(
        each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous() for each in gradients
    )


def takes(x: Tensor) -> bool:
    """Whether kernels.cpp is in use, and x is what it reads: one type of numbers throughout, on a CPU."""
    return now is not None and x.device.type == "cpu" and x.dtype in DTYPES and not torch.is_autocast_enabled("cpu")


def _compiled(linears: Linears) -> Any:
    bias = linears.bias()
    empty = linears.whole.new_empty(0)
    return now.Linears(
        linears.whole, linears.up, empty if bias is None else bias, linears.widths, linears.ranks, linears.scaling
    )
