"""A project's database: SQLite in WAL mode. Rows become dataclasses at this border and nowhere else."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from studio.errors import StoreBusyError, StoreError
from studio.paths import is_disk_full
from studio.store.light import Database
from studio.store.migrations import migrations

DATABASE_NAME = "studio.db"
BUSY_TIMEOUT_MS = 10_000


@contextmanager
def open_db(folder: Path) -> Iterator[Database]:
    """The database of a project folder, migrated to the newest schema, closed on leaving.

    Cheap (about a millisecond), so open it for each unit of work: no connection is shared between threads or pages.
    Raises StoreError when the file is damaged, locked for long, or written by a newer studio.
    """
    path = Path(folder) / DATABASE_NAME
    db = _connect(path)
    try:
        yield db
    except sqlite3.DatabaseError as error:
        # The file's or the disk's fault; a broken constraint is the caller's and keeps its type.
        if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
            raise _translated(error, path) from error
        raise
    finally:
        db.close()


def held_open(folder: Path) -> Database:
    """A connection that is held and not used, to be closed by the caller.

    While there is one, the files that SQLite keeps beside the database stay. Without them a full disk lets nobody open
    it, not even to read. Raises StoreError.
    """
    db = _connect(Path(folder) / DATABASE_NAME)
    db.execute("select count(*) from jobs").fetchone()  # opens those files
    return db


def _connect(path: Path) -> Database:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        db = Database(connection)
        _migrate(db, path)
        return db
    except (sqlite3.DatabaseError, OSError) as error:
        raise _translated(error, path) from error


def _migrate(db: Database, path: Path) -> None:
    known = {migration.name for migration in migrations.all()}
    applied = {migration.name for migration in migrations.applied(db)}
    if newer := applied - known:
        raise StoreError(
            f"{path} was written by a newer Retune Studio (schema {sorted(newer)[-1]}).",
            "Update this installation.",
        )
    if applied != known:
        with FileLock(path.with_suffix(".lock"), timeout=30):
            if db.journal_mode != "wal":
                db.enable_wal()
            migrations.apply(db)


BUSY_HINTS = {
    "database is locked": "Another process holds it for long; try again in a moment.",
    "database or disk is full": "The disk is full; free some space, nothing that was stored is lost.",
    "disk I/O error": "The disk is full or fails; free some space, nothing that was stored is lost.",
    "unable to open database file": "The disk is full, or the folder is not writable; nothing that was stored is lost.",
    "attempt to write a readonly database": "Make the project folder writable.",
}


def _translated(error: Exception, path: Path) -> StoreError:
    text = f"The database {path} cannot be used: {error}."
    if hint := BUSY_HINTS.get(str(error)):
        return StoreBusyError(text, hint)
    if is_disk_full(error, path.parent):
        return StoreBusyError(text, BUSY_HINTS["database or disk is full"])
    return StoreError(
        text, "Restore studio.db from a backup, or move it away to start with an empty one; files stay as they are."
    )
