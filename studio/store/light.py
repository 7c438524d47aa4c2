"""sqlite-utils as this package uses it: without pandas and numpy.

It loads both where they are installed, which costs half a second before any page or command can begin; none of our
rows hold their types.
"""

import importlib.abc
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Absent(importlib.abc.MetaPathFinder):
    """Says that modules are not installed, to the thread that made it; other threads import as ever."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._thread = threading.get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is left out here", name=fullname)
        return None


@contextmanager
def left_out(*names: str) -> Iterator[None]:
    """Within the block, this thread cannot import these modules; what is loaded already stays."""
    finder = _Absent(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with left_out("pandas", "numpy"):
    from sqlite_utils import Database

__all__ = ["Database", "left_out"]
