"""Which of several ways to compute the same is fastest on this GPU: measured once and remembered, never assumed.

What was found is kept for the GPU and the version of torch, under words that name everything the answer depends on.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from studio.paths import atomic_write_json, system_folder

FILE = "gpu.json"
CLEARLY = 0.95  # another way must take at most this share of the first one's time: smaller differences are chance
REPEATS = 5
Way = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """`name`: the fastest way, "" when none could be computed. The times of all, and why some failed."""

    name: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """In words, for a log."""
        times = [f"{name} {each:.3g} ms" for name, each in self.milliseconds.items()]
        return ", ".join(["measured on this GPU: " + ", ".join(times or ["nothing"]), *self._failures()])

    @property
    def ranked(self) -> list[str]:
        """The best first, then the others by their time."""
        by_time = sorted(self.milliseconds, key=self.milliseconds.__getitem__)
        return sorted(by_time, key=lambda name: name != self.name)

    def _failures(self) -> list[str]:
        return [f"{name} failed ({reason})" for name, reason in self.failed.items()]


def fastest(what: str, ways: Mapping[str, Way], device: torch.device) -> Choice:
    """The way that takes least time; the first unless another is clearly faster. `what` is measured once."""
    known = _remembered(device)
    if (found := known.get(what)) is None or set(found.milliseconds) | set(found.failed) != set(ways):
        found = _measure(ways, device)
        everything = {name: asdict(choice) for name, choice in (known | {what: found}).items()}
        atomic_write_json(_file(), {"key": _key(device), "found": everything})
    return found


def _measure(ways: Mapping[str, Way], device: torch.device) -> Choice:
    times, failed = {}, {}
    for name, way in ways.items():
        try:
            times[name] = round(1000 * seconds(way, device), 4)
        except Exception as error:  # a kernel, its compiler or its library may fail in whatever way
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return Choice(choose(times), times, failed)


def choose(times: Mapping[str, float]) -> str:
    """The first way unless another is clearly faster; "" for none."""
    if not times:
        return ""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] <= CLEARLY * times[first] else first


def seconds(way: Way, device: torch.device) -> float:
    """The least time of some calls, after one that compiles and warms up."""
    way()
    taken = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        way()
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _remembered(device: torch.device) -> dict[str, Choice]:
    """What was measured on this GPU with this torch; nothing when the file is of another, or damaged."""
    try:
        value = json.loads(_file().read_text(encoding="utf-8"))
        return {what: Choice(**found) for what, found in value["found"].items()} if value["key"] == _key(device) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _file() -> Path:
    return system_folder() / FILE


def _key(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, torch {version('torch')}"
