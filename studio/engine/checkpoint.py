"""Checkpoints of a run: written whole or not at all, verified before they are used, rotated last.

`step_N.pth` holds all that is needed to go on after step N; `step_N.manifest.json` (size, sha256) is written after it
and makes it valid; `last_checkpoint` names the newest, for people and for other tools.
"""

import errno
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from studio import checkpoint_files
from studio.checkpoint_files import manifest_path, read_manifest
from studio.engine.safe_load import load_pth
from studio.errors import CheckpointError
from studio.paths import atomic_path, atomic_write_json, atomic_write_text, remove, require_free_space, sha256_of
from studio.store import checkpoints as store
from studio.store import open_db

FORMAT = "retune/1"
LAST_CHECKPOINT = "last_checkpoint"
FILE_NAME = re.compile(r"step_(\d+)\.pth")
PACKAGES = ("torch", "transformers", "peft", "retune")


@dataclass(frozen=True)
class Found:
    """A sound checkpoint to resume from (None when there is none) and why newer ones were passed over."""

    path: Path | None
    notices: list[str]


class CheckpointFolder:
    """The checkpoints of one run; `folder` is its project's, `run_dir` lies in it."""

    def __init__(self, folder: Path, run_id: str, run_dir: Path, keep_last: int) -> None:
        self.run_dir = run_dir
        self._folder = folder
        self._run_id = run_id
        self._keep_last = keep_last

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write and verify a checkpoint, register it, then delete the oldest beyond keep_last.

        Raises DiskFullError or CheckpointError; older checkpoints are there as before.
        """
        path = self.run_dir / f"step_{step}.pth"
        # Twice: the old and the new exist side by side, and the database and logs grow too.
        require_free_space(self.run_dir, 2 * self._expected_bytes(content), f"checkpoint {path.name}")
        with atomic_path(path) as temporary:
            _write(temporary, content)
            sha256, size = sha256_of(temporary), temporary.stat().st_size
        _write_manifest(path, step, sha256, size)
        atomic_write_text(self.run_dir / LAST_CHECKPOINT, path.name + "\n")
        self._register(step, path, sha256, size)
        self._rotate(step)
        return path

    def go_on_from(self, step: int, path: Path) -> None:
        """The run goes on after this checkpoint: later ones belong to a way that was left, and are deleted."""
        for later, left in listed(self.run_dir):
            if later > step:
                self._delete(later, left)
        with open_db(self._folder) as db:
            registered = {row.step: row.sha256 for row in store.listed(db, self._run_id)}
            for gone in (later for later in registered if later > step):
                store.remove(db, self._run_id, gone)
        manifest = read_manifest(path)
        if registered.get(step) != manifest["sha256"]:  # it was written, and the run killed before it said so
            self._register(step, path, manifest["sha256"], manifest["size_bytes"])
        atomic_write_text(self.run_dir / LAST_CHECKPOINT, path.name + "\n")

    def find_resumable(self) -> Found:
        """The newest checkpoint that verifies."""
        return find_resumable(self.run_dir)

    def _expected_bytes(self, content: dict[str, Any]) -> int:
        return max([num_tensor_bytes(content), *(path.stat().st_size for _, path in listed(self.run_dir))])

    def _rotate(self, newest: int) -> None:
        others = [(step, path) for step, path in listed(self.run_dir) if step != newest]
        for step, path in others[max(0, self._keep_last - 1) :]:
            self._delete(step, path)

    def _register(self, step: int, path: Path, sha256: str, size: int) -> None:
        relative = str(path.resolve().relative_to(self._folder.resolve()))
        with open_db(self._folder) as db:
            store.put(db, store.Checkpoint(self._run_id, step, relative, sha256, size))

    def _delete(self, step: int, path: Path) -> None:
        with open_db(self._folder) as db:
            store.remove(db, self._run_id, step)
        remove(manifest_path(path))
        remove(path)


def listed(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's checkpoints, newest step first, sound or not."""
    found = [(int(match[1]), path) for path in run_dir.glob("step_*.pth") if (match := FILE_NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def find_resumable(run_dir: Path) -> Found:
    """The newest checkpoint of a run that verifies. Raises CheckpointError when there are some, and none is sound."""
    notices = []
    for _, path in listed(run_dir):
        try:
            verify(path)
            return Found(path, notices)
        except CheckpointError as error:
            notices.append(f"{path.name} was passed over: {error.message}")
    if notices:
        raise CheckpointError(
            f"No checkpoint of this run can be used. {' '.join(notices)}", "Start a new run with the same config."
        )
    return Found(None, [])


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose size and sha256 are as recorded. Raises CheckpointError."""
    found = "it is a folder" if path.is_dir() else checkpoint_files.verify(path)
    if found:
        raise CheckpointError(f"{path.name} cannot be used: {found}.", "Use the checkpoint before it.")
    return read_manifest(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify and read one of our checkpoints. Raises CheckpointError or UnsafeFileError."""
    verify(path)
    content = load_pth(path)
    written = content.get("meta", {}).get("format") if isinstance(content.get("meta"), dict) else None
    if written != FORMAT:
        raise CheckpointError(
            f"{path.name} has the format {written!r}, not {FORMAT!r}.",
            "Resume from a checkpoint that `retune train` wrote; convert foreign ones instead.",
        )
    return content


def versions() -> dict[str, str]:
    """Versions of what shaped the numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ImportError:  # the studio itself, run from a checkout that was never installed
            found[name] = "unknown"
    return found


def rng_state() -> dict[str, Any]:
    """State of every random generator, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator where `rng_state` found it."""
    version_, keys, gauss = state["python"]
    random.setstate((version_, tuple(keys), gauss))
    kind, numpy_keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(numpy_keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def num_tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers; tied ones count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(content)}
    return sum(storages.values())


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    """torch.save into an open file, then read it back against the checksums taken from memory."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch dresses a failed write as an error of its own; the cause says whether the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged is not None:
        raise OSError(errno.EIO, f"{path.name} did not reach the disk as written ({damaged})")


def _write_manifest(path: Path, step: int, sha256: str, size: int) -> None:
    manifest = {"file": path.name, "step": step, "size_bytes": size, "sha256": sha256, "versions": versions()}
    atomic_write_json(manifest_path(path), manifest)
