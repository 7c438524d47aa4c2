"""Where things live, how names become safe, and how files are written so that a crash leaves the old or the new."""

import errno
import getpass
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slugify import slugify as ascii_slug

from studio import faults, processes
from studio.errors import DiskFullError, ProjectError, StudioError

REPOSITORY = Path(__file__).resolve().parent.parent
RESERVED_SLUGS = {"con", "prn", "aux", "nul", "studio", "archive"} | {
    f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)
}
MAX_SLUG_LENGTH = 60
LEFTOVER_SECONDS = 3600


def home() -> Path:
    """The folder that holds `projects/`: RETUNE_HOME, else the repository."""
    chosen = os.environ.get("RETUNE_HOME")
    return Path(chosen).expanduser().resolve() if chosen else REPOSITORY


def projects_root() -> Path:
    return home() / "projects"


def system_folder() -> Path:
    """Machine-wide jobs (fetching a model, converting outside a project) keep their database here."""
    return projects_root() / ".studio"


def job_folders() -> list[Path]:
    """Folders with a job database: every project, and the machine-wide one."""
    root = projects_root()
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if not path.name.startswith(".") or path == system_folder()]
    return [folder for folder in folders if (folder / "studio.db").is_file()]


def models_root() -> Path:
    """Base models, shared by every project: RETUNE_MODELS, else the user's cache folder."""
    chosen = os.environ.get("RETUNE_MODELS")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return cache_folder() / "models"


def locks_folder() -> Path:
    """What processes of this user on this machine keep out of each other's way by, whatever their RETUNE_HOME:
    RETUNE_LOCKS, else a folder that no other machine sees, as a home folder may be, and no other user writes to."""
    if chosen := os.environ.get("RETUNE_LOCKS"):
        return _made(Path(chosen))
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir(), f"retune-{user}")
    with suppress(OSError):
        _made(folder)
        if not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == user):
            return folder
    return _made(cache_folder() / "locks")


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def cache_folder() -> Path:
    """What can be fetched or made again, for all projects of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retune"


def slugify(name: str, taken: Collection[str] = ()) -> str:
    """A folder name for any display name: lower-case ASCII, never empty, reserved or already taken."""
    base = ascii_slug(name, max_length=MAX_SLUG_LENGTH, word_boundary=False) or "project"
    if base in RESERVED_SLUGS:
        base = f"project-{base}"
    slug, number = base, 2
    while slug in taken:
        slug, number = f"{base}-{number}", number + 1
    return slug


def inside(root: Path, path: str | Path) -> Path:
    """`path` (relative to `root`, or absolute) with links resolved; ProjectError when it is not below `root`."""
    if "\0" in str(path):
        raise ProjectError(f"The path {str(path)!r} holds a NUL character.", "Give an ordinary file name.")
    real_root = Path(root).resolve()
    real = (real_root / path).resolve()
    if real != real_root and real_root not in real.parents:
        raise ProjectError(
            f"The path {str(path)!r} leads outside {real_root.name!r}.", "Give a path inside the project."
        )
    return real


def typed_path(text: str) -> Path:
    """A path as a person types it, with `~` for a home folder. Raises StudioError for a home that there is not."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise StudioError(f"The path {text[:200]!r} begins in no home folder: {error}", "Write it in full.") from error


def require_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise DiskFullError when fewer than `num_bytes` are free where `folder` lies."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise DiskFullError(
            f"Not enough disk space for {what}: it needs {human_bytes(num_bytes)}, {human_bytes(free)} are free.",
            "Free some space (old checkpoints, exports) or move RETUNE_HOME to a larger disk.",
        )


def human_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TB"


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """fsync a file, or every file and folder below a folder."""
    if path.is_dir():
        for child in path.iterdir():
            fsync_tree(child)
    fsync(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and takes its place, on failure it is removed.

    Serves files and folders. A folder that stands at `path` is moved aside first and removed last. What a killed
    process left beside `path` is cleared away. Raises DiskFullError when the disk filled up while writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    temporary = _beside(path, "tmp")
    try:
        faults.hit("begin", path)
        yield temporary
        faults.hit("fsync", path)
        fsync_tree(temporary)
        _put_in_place(temporary, path)
    except Exception as error:
        remove(temporary)
        if is_disk_full(error, path.parent):
            raise DiskFullError(
                f"The disk filled up while writing {path.name}; what was there before is unharmed.",
                "Free some space and try again.",
            ) from error
        raise
    except BaseException:
        remove(temporary)
        raise


def _beside(path: Path, what: str) -> Path:
    """A name next to `path` that says which process uses it."""
    return path.with_name(f".{what}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name[:80]}")


def clear_leftovers(folder: Path, older_than_seconds: float = LEFTOVER_SECONDS) -> None:
    """Remove what processes that were killed while they wrote left behind; a folder they had moved aside goes back.

    A process of another container has no id here that lives: only what nobody touched for a while is a leftover.
    """
    for leftover in folder.glob(".*-*-*-*"):
        what, pid, _mark, name = leftover.name.split("-", 3)
        if what not in (".tmp", ".old") or not pid.isdigit() or processes.created(int(pid)):
            continue
        if time.time() - leftover.lstat().st_mtime < older_than_seconds:
            continue
        if what == ".old" and not (folder / name).exists():
            with suppress(OSError):
                os.rename(leftover, folder / name)
        else:
            remove(leftover)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        aside = _beside(path, "old")
        os.rename(path, aside)
        faults.hit("aside", path)
        os.rename(temporary, path)
        fsync(path.parent)
        shutil.rmtree(aside)
    else:
        faults.hit("rename", path)
        os.replace(temporary, path)
        faults.hit("fsync folder", path)
        fsync(path.parent)
    faults.hit("end", path)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """True for ENOSPC/EDQUOT/EFBIG in any clothing: torch and safetensors raise their own types when a write fails."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    if "No space left" in text or "os error 28" in text or "os error 27" in text:
        return True
    return "inline_container" in text and "unexpected pos" in text and shutil.disk_usage(folder).free < 64 * 2**20


def as_studio_error(error: OSError) -> StudioError:
    """What the operating system refused, in words that say what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if is_disk_full(error, projects_root()):
        return DiskFullError(
            f"The disk is full{where}.",
            "Free some space (old checkpoints, exports) and try again; what is saved stays.",
        )
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    return StudioError(
        f"{reason}{where}.", "See that the file or folder is there and may be read and written, then try again."
    )


def remove(path: Path) -> None:
    """Delete a file or a folder that may not be there; a link is removed, never what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Delete a file or a folder so that its name is gone at once, whole: a folder is moved aside first."""
    if path.is_dir() and not path.is_symlink():
        aside = _beside(path, "tmp")
        os.rename(path, aside)
        path = aside
    remove(path)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        faults.watched(file, path).write(content)


def atomic_write_text(path: Path, text: str) -> None:
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    atomic_write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file, read in 4 MB pieces; `progress` gets the bytes read so far."""
    digest = hashlib.sha256()
    num_bytes = 0
    with open(path, "rb") as file:
        while piece := file.read(4 * 2**20):
            digest.update(piece)
            num_bytes += len(piece)
            if progress:
                progress(num_bytes)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
