"""Turning rows into dataclasses and back: `*_json` columns hold JSON text, times are UTC ISO text."""

import dataclasses
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlite_utils import Database

Record = TypeVar("Record")
JSON_SUFFIX = "_json"


def now() -> str:
    """UTC, ISO 8601, microseconds: sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new_id() -> str:
    """An id that sorts by time of creation, unique over all projects of a machine."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}"


def to_row(record: Any) -> dict[str, Any]:
    """A dataclass as a row; dict and list fields named x become a column x_json."""
    row = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, dict | list | tuple):
            row[field.name + JSON_SUFFIX] = json.dumps(value, ensure_ascii=False)
        else:
            row[field.name] = value
    return row


def from_row(cls: type[Record], row: dict[str, Any]) -> Record:
    """The dataclass of a row; columns the class does not know are left out."""
    plain = {
        key.removesuffix(JSON_SUFFIX): json.loads(value) if key.endswith(JSON_SUFFIX) and value is not None else value
        for key, value in row.items()
    }
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in plain.items() if key in names and value is not None})


def select(db: Database, cls: type[Record], sql: str, parameters: Any = ()) -> list[Record]:
    return [from_row(cls, row) for row in db.query(sql, parameters)]


@contextmanager
def writing(db: Database) -> Iterator[None]:
    """A transaction that takes the write lock at once: one that reads first and then writes would fail under load."""
    if db.conn.in_transaction:
        with db.atomic():
            yield
        return
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.conn.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise
