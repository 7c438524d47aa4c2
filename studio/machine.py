"""What this machine computes on and with, asked without torch: memory, GPUs, fast bfloat16, versions of packages."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from studio.paths import REPOSITORY, cache_folder

Kind = Literal["cpu", "cuda"]
CPU_INFO = Path("/proc/cpuinfo")
GPU_QUERY = ("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
ASK_SECONDS = 10
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
# Where control groups of version 2 and 1 say how much memory may be held, how much is, and, in memory.stat, what of it
# are files' pages that are given up when asked for: https://docs.kernel.org/admin-guide/cgroup-v2.html
GROUPS = Path("/sys/fs/cgroup")
GROUP_FILES = (
    (GROUPS, "memory.max", "memory.current", "inactive_file"),
    (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
MIB = 2**20
PACKAGES = ("torch", "transformers", "peft", "retune")  # what shapes the numbers of any run
UNKNOWN = "unknown"
QUANTIZE_TOOL = "llama-quantize"
LLAMA_CPP_PACKAGES = ("llama_cpp", "xllamacpp")
"""Python packages that bring llama.cpp, the one that is asked first first."""
INSTALL_QUANTIZE = "pip install 'retune[gguf]', or put llama.cpp's llama-quantize on the PATH; q8_0 needs neither."
MORE_PACKAGES = ("tokenizers", "numpy", "accelerate", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class Device:
    """Where a run computes. `has_bfloat16`: that it computes in it natively, which is what dtype auto asks for.
    `has_compiler`: that layers can be compiled for a processor."""

    kind: Kind
    name: str
    memory_bytes: int
    has_bfloat16: bool
    has_compiler: bool = True

    @property
    def key(self) -> str:
        """Equal on machines where a step takes as long."""
        facts = (self.kind, self.name, self.memory_bytes // 2**30, psutil.cpu_count(), platform.machine())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@cache
def device() -> Device:
    """The device that a run here would use: the first GPU that the driver names, else the processor."""
    return next(iter(_gpus()), None) or cpu()


@cache
def cpu() -> Device:
    text = CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""
    lines = dict(line.split("\t: ", 1) for line in text.splitlines() if "\t: " in line)
    name = next((value for key, value in lines.items() if key.strip() == "model name"), platform.processor())
    flags = next((value.split() for key, value in lines.items() if key.strip() == "flags"), [])
    has_bfloat16 = bool({"avx512_bf16", "amx_bf16"} & set(flags))
    return Device("cpu", name or platform.machine(), memory_bytes(), has_bfloat16, has_compiler())


def has_compiler() -> bool:
    """Whether there is a C++ compiler, or what one has built before."""
    is_built = any((cache_folder() / "extensions").glob("kernels-*.so"))
    return is_built or shutil.which(os.environ.get("CXX") or "c++") is not None


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of installed packages; one that is not installed is unknown, as the studio is in a mere checkout."""
    return {name: _version(name) for name in names}


def surroundings() -> dict[str, str]:
    """All that may change a run's numbers and is known without torch: equal here and there, the numbers may be too.

    `code` is a fingerprint of this package's own sources.
    """
    here = device()
    packages = {name: found for name, found in versions((*PACKAGES, *MORE_PACKAGES)).items() if found != UNKNOWN}
    return {
        "device": here.kind,
        "device name": here.name,
        "memory": f"{round(here.memory_bytes / 2**30)} GiB",
        "processors": str(psutil.cpu_count() or 0),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "code": _code(),
        **packages,
    }


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp") for path in (REPOSITORY / "studio").rglob(kind)):
        digest.update(f"{path.relative_to(REPOSITORY).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN


def card(memory_bytes: int) -> Device:
    """A GPU of that much memory that need not be here."""
    return Device("cuda", "", memory_bytes, has_bfloat16=True)


def memory_bytes() -> int:
    """Main memory that this process may use: the machine's, or what a container is held to."""
    limits = [folder / limit for folder, limit, _, _ in GROUP_FILES]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([psutil.virtual_memory().total, *(int(text) for text in texts if text.isdigit())])


def free_bytes() -> int:
    """Main memory that could be had now without anything being ended: the machine's, or what a container has left."""
    free = psutil.virtual_memory().available
    for folder, limit, usage, cached in GROUP_FILES:
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()).isdigit():
            held = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, int(text) - held + int(stat.get(cached, 0)))
    return max(0, free)


def device_names() -> list[str]:
    """Names for what a job that is started here may compute on: each GPU that CUDA shows it, else the processor."""
    gpus = [str(number) for number in range(len(_gpus()))]
    shown = os.environ.get(VISIBLE_GPUS)
    numbers = [each.strip() for each in shown.split(",")] if gpus and shown else gpus
    return [f"gpu-{re.sub('[^0-9a-zA-Z-]', '_', each)}" for each in sorted(set(numbers))] or ["cpu"]


def hides_gpus() -> bool:
    """Whether CUDA is told to show none to a process that is started here: the run computes on the processor."""
    return os.environ.get(VISIBLE_GPUS, "0").strip() in ("", "-1")


def _gpus() -> list[Device]:
    command = shutil.which("nvidia-smi")
    if command is None or hides_gpus():
        return []
    try:
        done = subprocess.run([command, *GPU_QUERY], capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer: torch will not find the card either
        return []
    return [found for line in done.stdout.splitlines() if (found := _gpu(line)) is not None]


def _gpu(line: str) -> Device | None:
    """'NVIDIA H100, 81559, 9.0' as a device; None for a line of another form."""
    name, *numbers = (part.strip() for part in line.split(","))
    try:
        memory, capability = int(numbers[0]) * MIB, float(numbers[1])
    except (ValueError, IndexError):
        return None
    return Device("cuda", name, memory, capability >= 8)
