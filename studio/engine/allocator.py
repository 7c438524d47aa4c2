"""What the C library keeps of memory that is no longer used. glibc can be told; others are left as they are."""

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from typing import Any

# Of glibc's malloc.h. From M_MMAP_THRESHOLD bytes on a block is mapped by itself, and unmapped as soon as it is free.
# The threshold rises by itself to MOST_BYTES as blocks are freed, and that of trimming to twice as much; once it is set
# it stays.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
FEW_BYTES, MOST_BYTES = 2**20, 32 * 2**20
ALL_BYTES = 2**31 - 1  # the largest that glibc takes
MADV_DONTNEED = 4  # of Linux's mman.h


@contextlib.contextmanager
def given_back_at_once() -> Iterator[None]:
    """Blocks of FEW_BYTES and more do not stay with this process when they are freed in here.

    For work that leaves small blocks among large passing ones, as squeezing a model into 4 bits does: each small one
    would hold on to a gap that a large one has left. Not for training, where the same blocks come again at each step.
    """
    _call("mallopt", M_MMAP_THRESHOLD, FEW_BYTES)
    try:
        yield
    finally:
        _call("mallopt", M_MMAP_THRESHOLD, MOST_BYTES)
        _call("mallopt", M_TRIM_THRESHOLD, 2 * MOST_BYTES)


def keep_freed() -> None:
    """What is freed stays with this process: training frees all of a step's blocks and takes them again in the next,
    and pages that come from the system are cleared one by one."""
    _call("mallopt", M_MMAP_THRESHOLD, MOST_BYTES)
    _call("mallopt", M_TRIM_THRESHOLD, ALL_BYTES)


def give_back_memory() -> None:
    """What is no longer referred to goes back to the system."""
    gc.collect()
    _call("malloc_trim", 0)


def forget_copied(address: int, num_bytes: int) -> None:
    """Let go of the memory behind bytes that were copied, if they are a mapped file's: readers read the file again."""
    page = mmap.PAGESIZE
    start, end = -(-address // page) * page, (address + num_bytes) // page * page
    if end > start and _is_of_a_file(address):
        _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _is_of_a_file(address: int) -> bool:
    """Whether this process has a file mapped there; where the system does not say, nothing is let go of."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            borders, _, _, _, inode = line.split()[:5]
            start, end = (int(border, 16) for border in borders.split("-"))
            if start <= address < end:
                return inode != "0"
    return False


def _call(name: str, *arguments: Any) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # musl has neither
            getattr(ctypes.CDLL(None), name)(*arguments)
