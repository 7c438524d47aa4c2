"""Where DeepSpeed's C++ parts are built, once for each version, and who may build them.

torch guards such a build with a file, which a killed process leaves behind: all later ones wait for it for ever.
Here the system holds the lock and frees it when its holder is gone.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.utils import cpp_extension, file_baton

from studio.paths import cache_folder


def prepare() -> None:
    """To be called before anything is built. The folder is TORCH_EXTENSIONS_DIR, unless that is set already."""
    version = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "extensions" / version)))
    folder.mkdir(parents=True, exist_ok=True)
    cpp_extension.FileBaton = Baton


class Baton(file_baton.FileBaton):
    """One process builds, the others wait for it, or for its end."""

    def __init__(self, lock_file_path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(lock_file_path, *args, **kwargs)
        # Another name than torch's: the file stays, and a program with torch's own lock would wait for it.
        self._lock = FileLock(f"{lock_file_path}ed")

    def try_acquire(self) -> bool:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def wait(self) -> None:
        """Until it is free. A build that was not ended is noticed by who loads what should be there."""
        with self._lock:
            pass

    def release(self) -> None:
        self._lock.release()
