"""Registered data files of a project, with the fingerprint of what was in them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import DataError
from studio.store.records import now, select, to_row, writing


@dataclass
class Dataset:
    """The current version of a dataset. `kind` is identity, general, tutorial or import; `path` is in the project.

    `origin` says how it was made.
    """

    name: str
    kind: str
    path: str
    fingerprint: str
    num_rows: int
    num_probes: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    version: int = 1
    created_at: str = field(default_factory=now)


@dataclass
class Version:
    """What a dataset was at one time. Numbers count from 1; `parent` is the version that was changed, 0 for none.

    `same_rows_as` is the older version whose rows were brought back, 0 when the rows are this version's own.
    """

    dataset: str
    number: int
    fingerprint: str
    num_rows: int
    num_probes: int = 0
    kind: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    made_by: str = ""
    parent: int = 0
    same_rows_as: int = 0
    created_at: str = field(default_factory=now)

    @property
    def rows_of(self) -> int:
        """The version that these rows were first in."""
        return self.same_rows_as or self.number


def put(db: Database, dataset: Dataset, made_by: str = "", parent: int = 0, same_rows_as: int = 0) -> Dataset:
    """Register a dataset and its version, in place of one of the same name and number."""
    version = Version(
        dataset.name, dataset.version, dataset.fingerprint, dataset.num_rows, dataset.num_probes, dataset.kind,
        dataset.origin, made_by, parent, same_rows_as, dataset.created_at,
    )  # fmt: skip
    with writing(db):
        db.table("dataset_versions").insert(to_row(version), replace=True)
        db.table("datasets").insert(to_row(dataset), replace=True)
    return dataset


def get(db: Database, name: str) -> Dataset:
    """Raises DataError, naming the datasets there are."""
    if dataset := find(db, name):
        return dataset
    there = [dataset.name for dataset in listed(db)]
    raise DataError(not_there(name, there), "Build or import it on the Data page.")


def not_there(name: str, there: Iterable[str]) -> str:
    """The sentence that a dataset is missing, with those there are."""
    names = ", ".join(there) or "none yet"
    return f"There is no dataset {name!r} in this project (there are: {names})."


def find(db: Database, name: str) -> Dataset | None:
    """The dataset of that name, None when there is none."""
    return next(iter(select(db, Dataset, "select * from datasets where name = ?", [name])), None)


def listed(db: Database) -> list[Dataset]:
    return select(db, Dataset, "select * from datasets order by created_at")


def remove(db: Database, name: str) -> None:
    """Forget a dataset and its versions."""
    name = get(db, name).name
    with writing(db):
        db.execute("delete from dataset_versions where dataset = ?", [name])
        db.table("datasets").delete(name)


def versions(db: Database, name: str) -> list[Version]:
    """All versions of a dataset, newest first. Raises DataError when there is no such dataset."""
    get(db, name)
    return select(db, Version, "select * from dataset_versions where dataset = ? order by number desc", [name])


def version(db: Database, name: str, number: int) -> Version:
    """One version. Raises DataError, naming those there are."""
    found = versions(db, name)
    for each in found:
        if each.number == number:
            return each
    raise DataError(
        f"Dataset {name!r} has no version {number}.", f"It has {', '.join(str(each.number) for each in found)}."
    )
