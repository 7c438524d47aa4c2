"""The database: migrations, several writers at once, and files that it must refuse."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from studio.errors import StoreError
from studio.paths import REPOSITORY
from studio.store import jobs, metrics, open_db
from studio.store.jobs import Job
from studio.store.migrations import migrations

TABLES = {"jobs", "runs", "metrics", "samples", "datasets", "checkpoints", "outputs", "evaluations", "answers"}


def test_a_new_database_has_every_table_and_wal(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        assert set(db.table_names()) >= TABLES
        assert db.journal_mode == "wal"


def test_migrations_run_once(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        jobs.add(db, Job("train", id="a"))
        before = [row.name for row in migrations.applied(db)]
    for _ in range(3):
        with open_db(tmp_path) as db:
            assert [row.name for row in migrations.applied(db)] == before
            assert jobs.get(db, "a").kind == "train"


def test_applying_migrations_again_changes_nothing(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        schema = db.schema
        migrations.apply(db)
        assert db.schema == schema


WRITER = """
import sys
from pathlib import Path
from studio.store import open_db, metrics, jobs
from studio.store.jobs import Job
folder, name = Path(sys.argv[1]), sys.argv[2]
for step in range(40):
    with open_db(folder) as db:
        metrics.record(db, name, step, {"train/loss": step, "train/grad_norm": 1.0})
        jobs.add(db, Job("train"))
"""


def test_processes_migrate_and_write_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, f"run-{n}"], cwd=REPOSITORY, stderr=subprocess.PIPE) for n in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
    with open_db(tmp_path) as db:
        assert [len(metrics.series(db, f"run-{n}", "train/loss")) for n in range(3)] == [40, 40, 40]
        assert len(jobs.listed(db)) == 120
        assert db.execute("pragma integrity_check").fetchone()[0] == "ok"


def test_a_database_of_a_newer_studio_is_refused(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        db.execute(
            "insert into _sqlite_migrations (migration_set, name, applied_at) values ('studio', 'm999_later', '')"
        )
    before = (tmp_path / "studio.db").read_bytes()
    with pytest.raises(StoreError, match="newer Retune Studio.*m999_later"), open_db(tmp_path):
        pass
    assert (tmp_path / "studio.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_database_is_named_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "studio.db").write_bytes(content)
    with pytest.raises(StoreError) as caught, open_db(tmp_path):
        pass
    assert "studio.db" in caught.value.message and "backup" in caught.value.hint
    assert (tmp_path / "studio.db").read_bytes() == content


def test_damage_found_while_reading_is_a_store_error(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        for number in range(500):
            jobs.add(db, Job("train", title="x" * 500, id=str(number)))
        db.execute("pragma wal_checkpoint(truncate)")
    path = tmp_path / "studio.db"
    content = bytearray(path.read_bytes())
    content[8192 * 2 :] = b"\xa5" * (len(content) - 8192 * 2)
    path.write_bytes(content)
    with pytest.raises(StoreError), open_db(tmp_path) as db:
        jobs.listed(db)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError), open_db(tmp_path / "file" / "below"):
        pass


def test_a_lock_that_lasts_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.store.BUSY_TIMEOUT_MS", 200)
    with open_db(tmp_path):
        pass
    holder = sqlite3.connect(tmp_path / "studio.db", isolation_level=None)
    holder.execute("begin immediate")
    try:
        with pytest.raises(StoreError, match="locked"), open_db(tmp_path) as db:
            jobs.add(db, Job("train"))
    finally:
        holder.execute("rollback")
        holder.close()
    with open_db(tmp_path) as db:
        assert jobs.listed(db) == []


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    from studio.store.records import writing

    with open_db(tmp_path) as db:
        with pytest.raises(ZeroDivisionError), writing(db):
            jobs.add(db, Job("train"))
            raise ZeroDivisionError
        assert jobs.listed(db) == []
