"""Fault points: named places where a test kills the process or fills the disk, to see what survives.

The variable RETUNE_FAULT says what happens where: `ACTION@POINT` or `ACTION@POINT:N` (the Nth time, 1 if not said),
several with commas, and with `/R` behind it in the process of rank R alone. POINT may be `*`: any. Actions: `kill`
(SIGKILL to this process), `pause` (SIGSTOP: it stands still there until it gets SIGCONT), `full` (the disk is full),
`oom` (the device's memory is). RETUNE_FAULT_TRACE names a file that gets a line for every point passed. Without either
a point costs one comparison.
"""

import errno
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

FAULT, TRACE = "RETUNE_FAULT", "RETUNE_FAULT_TRACE"
ORDER = re.compile(r"(?P<action>kill|pause|full|oom)@(?P<point>[^:/]+)(?::(?P<number>\d+))?(?:/(?P<rank>\d+))?")


@dataclass
class Plan:
    """What is to happen, as (action, point, number), and how often each point was passed."""

    orders: list[tuple[str, str, int]]
    trace: str = ""
    passed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, text: str, trace: str = "") -> "Plan":
        """Raises ValueError for an order that is none."""
        found = [(part, ORDER.fullmatch(part)) for part in text.split(",") if part]
        if wrong := [part for part, match in found if match is None]:
            raise ValueError(f"{FAULT}: {wrong[0]!r} is not ACTION@POINT, ACTION@POINT:N or that with /RANK")
        own = [match for _, match in found if match and match["rank"] in (None, os.environ.get("RANK"))]
        orders = [(match["action"], match["point"], int(match["number"] or 1)) for match in own]
        return cls(orders, trace)

    def hit(self, point: str) -> None:
        for name in (point, "*"):
            self.passed[name] += 1
        if self.trace:
            with open(self.trace, "a", encoding="utf-8") as file:
                file.write(point + "\n")
        for action, name, number in self.orders:
            if name in (point, "*") and self.passed[name] == number:
                _happen(action, point)


def arm(text: str, trace: str = "") -> None:
    """Follow this plan from now on; an empty one switches the points off."""
    global _plan
    _plan = Plan.read(text, trace) if text or trace else None


def hit(what: str, path: Path | None = None) -> None:
    """A fault point: `what` is about to be done, or was done, to `path` (its digits count as N: step_N.pth)."""
    if _plan is not None:
        _plan.hit(f"{what} {_kind_of(path)}" if path else what)


def _kind_of(path: Path) -> str:
    """step_N.pth for .tmp-123-1a2b-step_40.pth."""
    return re.sub(r"[0-9]+", "N", re.sub(r"^\.(tmp|old)-\d+-[0-9a-f]+-", "", path.name))


def watched(file: BinaryIO, path: Path) -> BinaryIO:
    """The file itself; with a plan, one whose every write is a fault point."""
    return file if _plan is None else cast(BinaryIO, _Watched(file, path))


class _Watched:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def write(self, content: bytes) -> int:
        hit("write", self._path)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _happen(action: str, point: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    if action == "full":
        raise OSError(errno.ENOSPC, "No space left on device", point)
    # torch is not imported for this: where it is not there, memory is what Python has.
    raise getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)(f"out of memory, asked for at {point}")


_plan: Plan | None = None
arm(os.environ.get(FAULT, ""), os.environ.get(TRACE, ""))
