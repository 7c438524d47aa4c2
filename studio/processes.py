"""Is a process still the one that was started, and if not, what ended it? A process id may be given to another."""

import os
import re
from pathlib import Path

import psutil

CREATED_TOLERANCE_SECONDS = 2


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


def boot_id() -> str:
    """What changes when the machine starts anew: the kernel's own id, else the time of the start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def oom_kills() -> int:
    """Processes that the kernel ended in this control group because memory ran out; 0 where it does not say."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().splitlines()[-1].split(":")[2]
        for file in (
            Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.events",
            Path("/sys/fs/cgroup/memory.events"),
        ):
            if file.is_file():
                found = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="ascii"), re.MULTILINE)
                return int(found[1]) if found else 0
    except (OSError, IndexError, UnicodeDecodeError):
        pass  # not Linux, or not allowed to look: nothing is known
    return 0


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
