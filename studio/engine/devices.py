"""Which device computes, in which number format, with how many threads, and from which seed."""

import os
import random
from pathlib import Path

import numpy
import psutil
import torch

from studio.engine import tuning
from studio.errors import ConfigError, Problem

STATUS = Path("/proc/self/status")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The first GPU when there is one (that of this rank, among several), else the CPU.

    Raises ConfigError for a device that is not here, and where there are more ranks than GPUs.
    """
    if name == "auto":
        return torch.device("cuda", _own_gpu()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError([Problem("device", f"is no device: {name!r}", "auto, cpu, cuda, cuda:0")]) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        here = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise ConfigError([Problem("device", f"{name!r} is not there; torch sees {here}", "auto, cpu")])
    return device


def _own_gpu() -> int:
    """The number of this rank's GPU. SLURM may show each rank its own alone, which is number 0 then."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count > 1:
        problem = f"process {number + 1} of this machine has no GPU of its own; torch sees {count}"
        raise ConfigError([Problem("distributed.processes_per_node", problem, f"1 to {count}")])
    return number if count > 1 else 0


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's name; auto is bfloat16 where the device computes it natively, else float32.

    Raises ConfigError for float16 on a CPU, where its arithmetic is emulated.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError([Problem("model.dtype", "float16 needs a GPU", "auto, float32, bfloat16")])
    if name not in DTYPES:
        raise ConfigError([Problem("model.dtype", f"got {name!r}", f"auto, {', '.join(DTYPES)}")])
    return DTYPES[name]


def has_fast_bfloat16(device: torch.device) -> bool:
    """CUDA from compute capability 8.0; a CPU with AVX512-BF16 or AMX, unless it was measured to be slower here.

    Elsewhere it is emulated, many times slower.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    known = tuning.remembered()
    slower = known is not None and 0 < known.bfloat16_gain < 1
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) and not slower


def set_threads() -> int:
    """Let torch use the cores that this process may use, unless OMP_NUM_THREADS says otherwise; returns the number."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(tuning.cores())
    return torch.get_num_threads()


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def memory_metric(device: torch.device) -> dict[str, float]:
    """The most that this process has held so far, in bytes, under the name of its metric."""
    if device.type == "cuda":
        return {"system/gpu_memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    return {"system/memory_bytes": float(peak_resident_bytes())}


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far; what it holds now where the system does not remember."""
    if STATUS.is_file():  # not getrusage: that one counts what the process which started this one held at that moment
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else psutil.Process().memory_info().rss
    return getattr(psutil.Process().memory_info(), "peak_wset", 0) or psutil.Process().memory_info().rss
