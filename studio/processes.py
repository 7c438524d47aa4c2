"""Is a process still the one that was started, and if not, what ended it? A process id may be given to another."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil

CREATED_TOLERANCE_SECONDS = 2
# What asks a job to stop, with or without saving, where its row cannot be written. Asked twice is asked once.
STOP_SIGNALS = {"save": signal.SIGUSR1, "discard": signal.SIGUSR2}
# How a process ended, behind its name.
OUT_OF_MEMORY = "was ended by the system because memory ran out; try a smaller micro_batch_size or max_length"
GONE = "is gone: it was killed, or memory ran out"
KILLED = "was killed (signal 9): by a person, or by the system because memory ran out"
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def created(pid: int) -> float:
    """Creation time of a process in seconds since the epoch; 0.0 when it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def lives(pid: int, process_created: float) -> bool:
    """Whether the very process of this id and creation time still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - process_created) < CREATED_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ask_to_stop(pid: int, process_created: float, how: str) -> bool:
    """Whether a process could be asked to stop by a signal (`how`: save or discard). One that has no handler for it,
    because it just begins or is of an older version, would be ended by it: it is left alone, as where that is not told.
    """
    number = STOP_SIGNALS[how]
    if not (lives(pid, process_created) and _handles(pid, number)):
        return False
    try:
        os.kill(pid, number)
        return True
    except ProcessLookupError:
        return False


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux tells of it; see proc_pid_status(5)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False  # another system, or the process has ended
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def boot_id() -> str:
    """What changes when the machine starts anew: the kernel's own id, else the time of the start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def oom_kills() -> int:
    """Processes that the kernel ended in this control group because memory ran out; 0 where it does not say."""
    try:
        texts = (file.read_text(encoding="ascii") for file in _oom_files())
        found = (re.search(r"^oom_kill (\d+)$", text, re.MULTILINE) for text in texts)
        return next((int(each[1]) for each in found if each), 0)
    except (OSError, UnicodeDecodeError):
        return 0  # not Linux, or not allowed to look: nothing is known


def _oom_files() -> Iterator[Path]:
    """Where the kernel counts for this group, its own file first; a container may show its group as the root.

    Version 2 of control groups has one tree (`0::/path`), version 1 one for memory (`4:memory:/path`); see
    https://docs.kernel.org/admin-guide/cgroup-v2.html and …/cgroup-v1/memory.html.
    """
    for line in OWN_GROUPS.read_text(encoding="ascii").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = GROUPS / controllers, "memory.oom_control" if controllers else "memory.events"
            yield from (file for file in (root / group.lstrip("/") / name, root / name) if file.is_file())


def out_of_memory(pid: int, kills_before: int) -> bool:
    """Whether the kernel says that it ended this process, which was killed; its count of the group, which was
    `kills_before` when the process began, may be of another's end."""
    return kernel_says_oom(pid) or oom_kills() > kills_before


def kernel_says_oom(pid: int) -> bool:
    """Whether the kernel's log, where it may be read, says that it ended this process for want of memory."""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    mark = f"Killed process {pid} ".encode()
    try:
        while line := os.read(log, 8192):
            if mark in line:
                return True
    except OSError:
        pass  # BlockingIOError at its end; a line that was overwritten while it was read
    finally:
        os.close(log)
    return False
