"""Checkpoints of a run: written whole or not at all, verified before they are used, rotated last.

`step_N.pth`, a file or a folder, holds all that is needed to go on after step N; `step_N.manifest.json` beside it says
its size and sha256. A save is: a temporary file, fsync, the manifest, rename, fsync of the folder, the row in the
database, and only then the deletion of older ones. So what has its name is whole and has its manifest, whenever the
process dies; a manifest without a file, a row without either and the like are put in order by `go_on_from`.
`last_checkpoint` names the newest, for people and for other tools.
"""

import errno
import random
import re
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from studio import checkpoint_files, faults
from studio.checkpoint_files import STATE_FILE, manifest_path, read_manifest
from studio.engine.safe_load import load_pth
from studio.errors import CheckpointError, DiskFullError, StoreBusyError
from studio.machine import versions
from studio.paths import (
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    discard,
    folder_bytes,
    fsync_tree,
    remove,
    require_free_space,
)
from studio.store import checkpoints as store
from studio.store import open_db

FORMAT = "retune/1"
LAST_CHECKPOINT = "last_checkpoint"
FILE_NAME = re.compile(r"step_(\d+)\.pth")


@dataclass(frozen=True)
class Found:
    """A sound checkpoint to resume from (None when there is none) and why newer ones were passed over."""

    path: Path | None
    notices: list[str]


class CheckpointFolder:
    """The checkpoints of one run; `folder` is its project's, `run_dir` lies in it. One process writes there."""

    def __init__(self, folder: Path, run_id: str, run_dir: Path, keep_last: int) -> None:
        self.run_dir = run_dir
        self._folder = folder
        self._run_id = run_id
        self._keep_last = keep_last

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, sound or not."""
        return (self.run_dir / f"step_{step}.pth").exists()

    def save(self, step: int, content: dict[str, Any], keep: Collection[int] = ()) -> Path:
        """Commit a checkpoint that is one file, `content`; as `commit`."""
        num_bytes = num_tensor_bytes(content)
        return self.commit(step, lambda temporary: write_pth(temporary, content), num_bytes, keep)

    def commit(self, step: int, write: Callable[[Path], None], num_bytes: int = 0, keep: Collection[int] = ()) -> Path:
        """Let `write` make a file or a folder at the path that it gets, verify and register it as the checkpoint of
        `step`, then delete the oldest beyond keep_last, but none of the steps in `keep`.

        `num_bytes` is what is expected to be written. Raises DiskFullError or CheckpointError; older checkpoints are
        there as before.
        """
        path = self.run_dir / f"step_{step}.pth"
        self.require_space(num_bytes, path.name)
        try:
            with atomic_path(path) as temporary:
                write(temporary)
                fsync_tree(temporary)
                measured = checkpoint_files.measure(temporary)
                manifest = {"file": path.name, "step": step, **measured, "versions": versions()}
                atomic_write_json(manifest_path(path), manifest)
        except BaseException:
            if not path.exists():
                remove(manifest_path(path))
            raise
        self._register_and_rotate(step, path, keep)
        return path

    def require_space(self, num_bytes: int, what: str) -> None:
        """Raises DiskFullError unless a checkpoint of that many bytes, or of the size of those there are, fits twice:
        the old and the new exist side by side, and the database and logs grow too."""
        sizes = [folder_bytes(path) if path.is_dir() else path.stat().st_size for _, path in listed(self.run_dir)]
        require_free_space(self.run_dir, 2 * max([num_bytes, *sizes]), what)

    def go_on_from(self, step: int, path: Path, keep: Collection[int] = ()) -> None:
        """The run goes on after this checkpoint: later ones belong to a way that was left, and are deleted.

        What a process that died while it saved did not come to is done: files and rows of the others agree again, and
        the oldest are gone, but for the steps in `keep`.
        """
        for later, left in listed(self.run_dir):
            if later > step:
                self._delete(later, left)
        self.match_rows()
        self._clear_manifests()
        atomic_write_text(self.run_dir / LAST_CHECKPOINT, path.name + "\n")
        self._rotate(step, keep)

    def match_rows(self) -> None:
        """A row for each checkpoint that is whole at a glance, and none for what is not there. Raises StoreError."""
        there = dict(listed(self.run_dir))
        with open_db(self._folder) as db:
            registered = {row.step: row.sha256 for row in store.listed(db, self._run_id)}
            for gone in registered.keys() - there.keys():
                store.remove(db, self._run_id, gone)
        for step, path in there.items():
            if not checkpoint_files.glance(path) and registered.get(step) != read_manifest(path)["sha256"]:
                self._register(step, path, read_manifest(path))

    def mark_best(self, step: int, measure: str, value: float) -> None:
        """This step's checkpoint is the best one by `measure`. Raises StoreError."""
        with open_db(self._folder) as db:
            store.mark_best(db, self._run_id, step, measure, value)

    def _marked(self) -> list[int]:
        """The best one by its mark: it stays while a better one could not be saved."""
        with open_db(self._folder) as db:
            return [row.step for row in store.listed(db, self._run_id) if row.is_best]

    def _clear_manifests(self) -> None:
        """Manifests whose file never got its name, or is gone already."""
        for manifest in self.run_dir.glob("step_*.manifest.json"):
            if not manifest.with_name(manifest.name.replace(".manifest.json", ".pth")).exists():
                remove(manifest)

    def _register_and_rotate(self, step: int, path: Path, keep: Collection[int]) -> None:
        """What follows once the files are safe; a database that cannot be written just now puts it off."""
        try:
            atomic_write_text(self.run_dir / LAST_CHECKPOINT, path.name + "\n")
            self.match_rows()
            self._rotate(step, keep)
        except (StoreBusyError, DiskFullError) as error:
            print(f"{path.name} is saved; its entry in the database follows later: {error}", flush=True)

    def _rotate(self, newest: int, keep: Collection[int]) -> None:
        there = dict(listed(self.run_dir))
        stays = {newest, *keep, *(() if there.keys() >= set(keep) else self._marked())}
        others = [(step, path) for step, path in there.items() if step not in stays]
        for step, path in others[max(0, self._keep_last - 1) :]:
            self._delete(step, path)

    def _register(self, step: int, path: Path, manifest: dict[str, Any]) -> None:
        relative = str(path.resolve().relative_to(self._folder.resolve()))
        faults.hit("row checkpoint")
        with open_db(self._folder) as db:
            store.put(db, store.Checkpoint(self._run_id, step, relative, manifest["sha256"], manifest["size_bytes"]))

    def _delete(self, step: int, path: Path) -> None:
        """Row, file, manifest: a file that has its name has its manifest at every moment."""
        faults.hit("rotate row")
        with open_db(self._folder) as db:
            store.remove(db, self._run_id, step)
        faults.hit("rotate file")
        discard(path)
        faults.hit("rotate manifest")
        remove(manifest_path(path))
        faults.hit("rotate end")


def listed(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's checkpoints, newest step first, sound or not."""
    found = [(int(match[1]), path) for path in run_dir.glob("step_*.pth") if (match := FILE_NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def find_resumable(run_dir: Path) -> Found:
    """The newest checkpoint of a run that verifies. Raises CheckpointError when there are some, and none is sound."""
    notices = []
    for _, path in listed(run_dir):
        if not (wrong := checkpoint_files.verify(path)):
            return Found(path, notices)
        notices.append(f"{path.name} was passed over: {wrong}.")
    if notices:
        raise CheckpointError(
            f"No checkpoint of this run can be used. {' '.join(notices)}", "Start a new run with the same config."
        )
    return Found(None, [])


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose size and sha256 are as recorded. Raises CheckpointError."""
    if found := checkpoint_files.verify(path):
        raise CheckpointError(f"{path.name} cannot be used: {found}.", "Use the checkpoint before it.")
    return read_manifest(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify and read one of our checkpoints; a folder's weights stay where they are.

    Raises CheckpointError or UnsafeFileError.
    """
    verify(path)
    content = load_pth(path / STATE_FILE if path.is_dir() else path)
    written = content.get("meta", {}).get("format") if isinstance(content.get("meta"), dict) else None
    if written != FORMAT:
        raise CheckpointError(
            f"{path.name} has the format {written!r}, not {FORMAT!r}.",
            "Resume from a checkpoint that `retune train` wrote; convert foreign ones instead.",
        )
    return content


def write_pth(path: Path, content: dict[str, Any]) -> None:
    """torch.save into an open file, then read it back against the checksums taken from memory. Raises OSError."""
    try:
        with open(path, "wb") as file:
            torch.save(content, faults.watched(file, path))
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
