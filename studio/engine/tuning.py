"""How this processor computes fastest: number format, threads, and how long idle threads spin. Measured once.

OpenMP reads its settings when it is loaded, so each candidate is measured by a process of its own, before torch is
imported here: `python -m studio.engine.tuning` computes a layer's products for a moment and prints how long each took.
What was found is remembered for the processor and the version of torch.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from studio import machine
from studio.paths import REPOSITORY, atomic_write_json, system_folder

FILE = "cpu.json"
# Where nothing was measured: on a busy machine threads that spin take each other's cores, and steps are several times
# slower. On an idle one a long spin is faster (benchmarks/README.md), which is why it is measured then.
DEFAULT_SPIN = "1000"
SPINS = (DEFAULT_SPIN, "0", "300000")  # passes of an idle thread through its waiting loop before it sleeps
CLEARLY = 0.9  # a candidate must take at most this share of the default's time: smaller differences are chance
BUSY_LOAD = 0.7  # processes that want a core, for each core: above that nothing can be told
MEASURE_SECONDS = 0.4
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Tuning:
    """`threads` and `spin` are set for OpenMP; `bfloat16_gain`: how many times faster than float32 (0: not known)."""

    threads: int
    spin: str = DEFAULT_SPIN
    bfloat16_gain: float = 0.0


def apply() -> Tuning:
    """Set what is best for the process that calls this before it imports torch; what the person set stays."""
    if os.environ.get("OMP_NUM_THREADS") or "GOMP_SPINCOUNT" in os.environ:
        outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is one number a level
        return Tuning(int(outermost) if outermost.isdigit() else cores())
    found = remembered() or _measure() or Tuning(cores())
    os.environ["GOMP_SPINCOUNT"] = found.spin
    os.environ["OMP_NUM_THREADS"] = str(found.threads)
    return found


def remembered() -> Tuning | None:
    """What was measured on this processor with this torch; None when nothing was."""
    try:
        value = json.loads(_file().read_text(encoding="utf-8"))
        return Tuning(**value["tuning"]) if value["key"] == _key() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def choose(seconds: dict[tuple[int, str], dict[str, float]], default: tuple[int, str]) -> Tuning:
    """The best of the measured (threads, spin); the default unless another is clearly faster."""

    def took(candidate: tuple[int, str]) -> float:
        return min(seconds[candidate].values())

    best = min(seconds, key=took)
    if took(best) > CLEARLY * took(default):
        best = default
    formats = seconds[best]
    return Tuning(*best, round(formats["float32"] / formats["bfloat16"], 3))


def _measure() -> Tuning | None:
    """None when the machine is too busy, or has a GPU."""
    if machine.device().kind != "cpu" or psutil.getloadavg()[0] > BUSY_LOAD * cores():
        return None
    print("measuring once how this processor computes fastest", flush=True)
    default = (cores(), DEFAULT_SPIN)
    logical = psutil.cpu_count() or cores()
    candidates = [(cores(), spin) for spin in SPINS] + ([(logical, DEFAULT_SPIN)] if logical != cores() else [])
    seconds = {candidate: times for candidate in candidates if (times := _times(*candidate))}
    if default not in seconds:
        return None
    found = choose(seconds, default)
    atomic_write_json(_file(), {"key": _key(), "tuning": asdict(found)})
    return found


def _times(threads: int, spin: str) -> dict[str, float]:
    """Seconds of the same work in each number format; {} when it could not be measured."""
    settings = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin}
    command = [sys.executable, "-m", "studio.engine.tuning"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            cwd=REPOSITORY,
            env={**os.environ, **settings},
            timeout=TIMEOUT_SECONDS,
            check=True,
        )
        return {name: float(value) for name, value in json.loads(done.stdout).items()}
    except (subprocess.SubprocessError, ValueError, OSError) as error:
        print(f"not measured: {error}", flush=True)
        return {}


def _file() -> Path:
    return system_folder() / FILE


def _key() -> str:
    return f"{machine.cpu().name}, {cores()} cores, torch {version('torch')}"


def _main() -> dict[str, Any]:
    """Seconds of a small layer's products and what stands between them, in each number format."""
    import torch

    return {name: _layer_seconds(getattr(torch, name)) for name in ("float32", "bfloat16")}


def _layer_seconds(dtype: Any) -> float:
    import torch

    x = torch.randn(256, 576).to(dtype)
    up, down = torch.randn(1536, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.silu(x @ up.t()) @ down.t()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(json.dumps(_main()))
