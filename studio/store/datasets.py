"""Registered data files of a project, with the fingerprint of what was in them."""

from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import DataError
from studio.store.records import now, select, to_row


@dataclass
class Dataset:
    """`kind` is identity, general, tutorial or import; `path` is relative to the project.

    `origin` says how it was made.
    """

    name: str
    kind: str
    path: str
    fingerprint: str
    num_rows: int
    num_probes: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    created_at: str = field(default_factory=now)


def put(db: Database, dataset: Dataset) -> Dataset:
    """Register a dataset, in place of one of the same name."""
    db.table("datasets").insert(to_row(dataset), replace=True)
    return dataset


def get(db: Database, name: str) -> Dataset:
    """Raises DataError, naming the datasets there are."""
    found = select(db, Dataset, "select * from datasets where name = ?", [name])
    if not found:
        names = ", ".join(dataset.name for dataset in listed(db)) or "none yet"
        raise DataError(
            f"There is no dataset {name!r} in this project (there are: {names}).",
            "Build or import it on the Data page.",
        )
    return found[0]


def listed(db: Database) -> list[Dataset]:
    return select(db, Dataset, "select * from datasets order by created_at")


def remove(db: Database, name: str) -> None:
    db.table("datasets").delete(get(db, name).name)
