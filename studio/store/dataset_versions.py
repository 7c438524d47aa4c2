"""Changes a dataset's files and its row together, so that after a crash at any moment they agree.

data/NAME.jsonl is the current version, data/versions/NAME/NUMBER.jsonl the older ones; NAME.probes.jsonl likewise.
A change is staged under its own number, then registered, then moved to the current place. A staged file with the
current number says that the move was cut short; `settle` ends it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from studio.data.conversation import Conversation, canonical_line
from studio.data.files import scan
from studio.data.formats import RowProblem, convert_rows
from studio.data.raw_rows import FOLDER as RAW
from studio.data.tokens import fingerprint
from studio.errors import DataError
from studio.paths import atomic_path, atomic_write_text, fsync, inside, remove
from studio.store import datasets as store
from studio.store import open_db
from studio.store.datasets import Dataset, Version
from studio.store.light import Database
from studio.store.records import now

ROWS, PROBES = ".jsonl", ".probes.jsonl"
WAIT_SECONDS = 30.0

Probe = Mapping[str, Any]


def save(
    folder: Path,
    name: str,
    conversations: Iterable[Conversation],
    kind: str = "",
    origin: dict[str, Any] | None = None,
    probes: Sequence[Probe] = (),
    made_by: str = "",
    expected: int | None = None,
) -> Dataset:
    """Make the rows a dataset's new version, in bounded memory; what was there stays as an older version.

    With `kind` the dataset is made anew, with its probes; without, this is an edit of the dataset that is there and
    its probes stay. `expected` is the version that was edited. Raises DataError when the dataset is at another one,
    when there is nothing to edit, or when someone else is writing it.
    """
    with _changing(folder, name) as (db, before):
        _require(before, expected)
        number = _next_number(db, name)
        edited = None if kind else before or store.get(db, name)
        digest, num_rows = _write_rows(_staged(folder, name, number, ROWS), conversations)
        _stage_probes(folder, name, number, None if edited else probes)
        dataset = Dataset(name, kind, f"data/{name}{ROWS}", digest, num_rows, len(probes), origin or {}, number)
        if edited:
            origin = edited.origin | {"edited": True}
            dataset = replace(dataset, kind=edited.kind, num_probes=edited.num_probes, origin=origin)
        made = _make_current(db, folder, before, dataset, made_by or ("edited" if edited else "made"))
        _sweep_raw(db, folder, name)
        return made


def restore(folder: Path, name: str, number: int, expected: int | None = None, made_by: str = "") -> Dataset:
    """Bring the rows, probes and origin of an older version back, as a new version. Raises DataError."""
    with _changing(folder, name) as (db, before):
        wanted = store.version(db, name, number)
        _require(before, expected)
        if before is None or number == before.version:
            raise DataError(f"Version {number} of {name!r} is the current one.", "Choose an older version.")
        return _bring_back(db, folder, before, wanted, made_by or f"version {number} restored")


def undo(folder: Path, name: str, expected: int | None = None) -> Dataset:
    """Take the last change back, as a new version; undoing again goes one change further. Raises DataError."""
    with _changing(folder, name) as (db, before):
        current = store.version(db, name, before.version if before else 0)
        _require(before, expected)
        changed = store.version(db, name, current.rows_of)
        if before is None or not changed.parent:
            raise DataError(f"Nothing is left to undo in {name!r}.", "`retune data versions` lists what it was.")
        wanted = store.version(db, name, changed.parent)
        return _bring_back(db, folder, before, wanted, f"undo of version {changed.number}: {changed.made_by}")


def rows_file(folder: Path, name: str, number: int = 0, digest: str = "") -> Path:
    """The file of a version, the current one for 0; a change that was cut short is ended first.

    `digest` is the fingerprint that the version must have. Raises DataError when there is no such version or file.
    """
    with open_db(folder) as db:
        dataset = settle(folder, store.get(db, name))
        found = store.version(db, name, number or dataset.version)
    if digest and found.fingerprint != digest:
        raise DataError(
            f"Version {number} of dataset {name!r} holds other rows than before: it was deleted and made anew.",
            "Start a new run on the rows there are now.",
        )
    path = _current(folder, name, ROWS) if found.number == dataset.version else _staged(folder, name, number, ROWS)
    if not path.is_file():
        raise DataError(f"The file of dataset {name!r} is gone ({path.name}).", "Build or import it again.")
    return path


def stream(folder: Path, name: str, number: int = 0) -> Iterator[Conversation]:
    """The rows of a version, the current one for 0, in bounded memory. Raises DataError at one that cannot be read."""
    path = rows_file(folder, name, number)
    for _, row in convert_rows(scan(path), "messages"):
        if isinstance(row, RowProblem):
            raise DataError(f"{path.name}, {row}", "Build or import the dataset again, or restore an older version.")
        yield row


def probes_file(folder: Path, name: str, number: int) -> Path | None:
    """The file of a version's held-out probes; None when it has none."""
    with open_db(folder) as db:
        current = settle(folder, store.get(db, name)).version
    path = _current(folder, name, PROBES) if number == current else _staged(folder, name, number, PROBES)
    return path if path.is_file() else None


def load_probes(folder: Path, name: str) -> list[dict[str, Any]]:
    """The held-out probes of a dataset; empty when it has none."""
    path = _current(folder, name, PROBES)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def note(folder: Path, name: str, notes: Mapping[str, Any]) -> Dataset:
    """Write notes into the origin of a dataset as it is, None to take one out; its rows and version stay."""
    with _changing(folder, name) as (db, _):
        dataset = store.get(db, name)
        version = store.version(db, name, dataset.version)
        origin = {key: value for key, value in (dataset.origin | dict(notes)).items() if value is not None}
        noted = replace(dataset, origin=origin)
        return store.put(db, noted, version.made_by, version.parent, version.same_rows_as)


def delete(folder: Path, name: str, expected: int | None = None) -> None:
    """Forget a dataset and all of its versions, and delete their files. Raises DataError when there is none, or when
    it is not at the version `expected`."""
    with _changing(folder, name) as (db, before):
        _require(before, expected)
        store.remove(db, name)
        for suffix in (ROWS, PROBES):
            remove(_current(folder, name, suffix))
        remove(_versions_folder(folder, name))
        remove(inside(folder, f"{RAW}/{name}"))


def settle(folder: Path, dataset: Dataset) -> Dataset:
    """End a change of this dataset that was cut short, when there is one; the dataset as it is then."""
    if not _staged(folder, dataset.name, dataset.version, ROWS).exists():
        return dataset
    with _changing(folder, dataset.name) as (_, now_there):
        return now_there or dataset


@contextmanager
def _changing(folder: Path, name: str) -> Iterator[tuple[Database, Dataset | None]]:
    """Alone with the dataset, whose last change is complete."""
    place = _versions_folder(folder, name).parent
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / f".{name}.lock", timeout=WAIT_SECONDS), open_db(folder) as db:
            before = store.find(db, name)
            if before and _staged(folder, name, before.version, ROWS).exists():
                _move_in(folder, before)
            yield db, before
    except Timeout:
        raise DataError(
            f"Dataset {name!r} is being written by another window or job.", "Try again when that has ended."
        ) from None


def _require(before: Dataset | None, expected: int | None) -> None:
    there = before.version if before else 0
    if expected is not None and there != expected:
        raise DataError(
            f"The change was made to version {expected}, but the dataset is at version {there} by now.",
            "Someone else saved in between. Look at the dataset again, then make your change to what is there.",
        )


def _next_number(db: Database, name: str) -> int:
    found = db.execute("select max(number) from dataset_versions where dataset = ?", [name]).fetchone()[0]
    return int(found or 0) + 1


def _bring_back(db: Database, folder: Path, before: Dataset, wanted: Version, made_by: str) -> Dataset:
    """Copied, not linked: whoever edits the current file by hand leaves the old one as it is."""
    name, number = before.name, _next_number(db, before.name)
    for suffix in (ROWS, PROBES):
        source, target = _staged(folder, name, wanted.number, suffix), _staged(folder, name, number, suffix)
        if source.is_file():
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
        elif suffix == ROWS:
            raise DataError(f"The file of version {wanted.number} of {name!r} is gone.", "Choose another version.")
    dataset = replace(
        before, kind=wanted.kind or before.kind, fingerprint=wanted.fingerprint, num_rows=wanted.num_rows,
        num_probes=wanted.num_probes, origin=wanted.origin, version=number, created_at=now(),
    )  # fmt: skip
    return _make_current(db, folder, before, dataset, made_by, wanted.rows_of)


def _make_current(
    db: Database, folder: Path, before: Dataset | None, dataset: Dataset, made_by: str, same_rows_as: int = 0
) -> Dataset:
    """Keep what is current under its number, register the staged version, move its files in."""
    if before:
        for suffix in (PROBES, ROWS):
            _keep(_current(folder, before.name, suffix), _staged(folder, before.name, before.version, suffix))
    store.put(db, dataset, made_by, before.version if before else 0, same_rows_as)
    _move_in(folder, dataset)
    return dataset


def _keep(current: Path, kept: Path) -> None:
    """The current file under a second name: a link, which costs nothing, or a copy where links cannot be made."""
    if not current.is_file():
        return
    kept.unlink(missing_ok=True)
    try:
        os.link(current, kept)
        fsync(kept.parent)
    except OSError:
        with atomic_path(kept) as temporary:
            shutil.copyfile(current, temporary)


def _move_in(folder: Path, dataset: Dataset) -> None:
    """Rows last: as long as they are staged, the move is not done. May be done twice."""
    probes = _staged(folder, dataset.name, dataset.version, PROBES)
    if probes.exists():
        _replace(probes, _current(folder, dataset.name, PROBES))
    elif not dataset.num_probes:
        remove(_current(folder, dataset.name, PROBES))
    _replace(_staged(folder, dataset.name, dataset.version, ROWS), _current(folder, dataset.name, ROWS))
    fsync(folder / "data")


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)
    source.unlink(missing_ok=True)  # of two names of one file, replacing leaves both


def _write_rows(path: Path, conversations: Iterable[Conversation]) -> tuple[str, int]:
    """(fingerprint, number of rows) of the canonical file."""
    num_rows = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:

        def written() -> Iterator[Conversation]:
            nonlocal num_rows
            for conversation in conversations:
                file.write(canonical_line(conversation))
                num_rows += 1
                yield conversation

        return fingerprint(written()), num_rows


def _sweep_raw(db: Database, folder: Path, name: str) -> None:
    """Remove raw rows that no version knows: an import that was cut short left them."""
    known = {version.origin.get("raw") for version in store.versions(db, name)}
    for each in inside(folder, f"{RAW}/{name}").glob("*"):
        if f"{RAW}/{name}/{each.name}" not in known and not each.name.startswith("."):
            remove(each)


def _stage_probes(folder: Path, name: str, number: int, probes: Sequence[Probe] | None) -> None:
    """None stages a copy of those that are there."""
    staged, current = _staged(folder, name, number, PROBES), _current(folder, name, PROBES)
    staged.unlink(missing_ok=True)
    if probes:
        atomic_write_text(staged, "".join(json.dumps(probe, ensure_ascii=False) + "\n" for probe in probes))
    elif probes is None and current.is_file():
        with atomic_path(staged) as temporary:
            shutil.copyfile(current, temporary)


def _current(folder: Path, name: str, suffix: str) -> Path:
    return inside(folder, f"data/{name}{suffix}")


def _staged(folder: Path, name: str, number: int, suffix: str) -> Path:
    """Where a version lies that is not, or not yet, the current one."""
    return _versions_folder(folder, name) / f"{number}{suffix}"


def _versions_folder(folder: Path, name: str) -> Path:
    return inside(folder, f"data/versions/{name}")
