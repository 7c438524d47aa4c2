"""Where DeepSpeed's C++ parts are built, once for each version, and who may build them.

torch guards such a build with a file, which a killed process leaves behind: all later ones wait for it for ever.
Here the system holds the lock and frees it when its holder is gone.
"""

import fcntl
import os
import sys
from pathlib import Path

import torch
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

    def try_acquire(self) -> bool:
        self._open()
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def wait(self) -> None:
        """Until it is free. A build that was not ended is noticed by who loads what should be there."""
        self._open()
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        self.release()

    def release(self) -> None:
        os.close(self.fd)

    def _open(self) -> None:
        # Another name than torch's: the file stays, and a program with torch's own lock would wait for it.
        self.fd = os.open(f"{self.lock_file_path}ed", os.O_CREAT | os.O_RDWR)
