"""Versions of a dataset: every change is a new one, and after a crash at any moment files and database agree."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.data.formats import Conversation, Message, read_conversations
from studio.data.tokens import fingerprint
from studio.errors import DataError
from studio.paths import REPOSITORY
from studio.store import dataset_versions as history
from studio.store import datasets, open_db
from studio.store.datasets import Dataset
from studio.store.migrations import migrations


def rows(*answers: str) -> list[Conversation]:
    return [Conversation((Message("user", "q"), Message("assistant", answer))) for answer in answers]


def answers(path: Path) -> list[str]:
    return [row.messages[-1].content for row in read_conversations(path, "messages")]


def probe(question: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}], "kind": "general"}


def current(folder: Path, name: str = "mine") -> Dataset:
    with open_db(folder) as db:
        return history.settle(folder, datasets.get(db, name))


def agree(folder: Path, name: str = "mine") -> list[str]:
    """The answers in the current file, which must be those of the registered version, as must all older files."""
    dataset = current(folder, name)
    with open_db(folder) as db:
        there = datasets.versions(db, name)
    assert there[0].number == dataset.version and there[0].fingerprint == dataset.fingerprint
    for version in there:
        found = read_conversations(history.rows_file(folder, name, version.number), "messages")
        assert fingerprint(found) == version.fingerprint and len(found) == version.num_rows
    return answers(folder / "data" / f"{name}.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with two versions: `a`, then edited to `a, b`."""
    history.save(tmp_path, "mine", rows("a"), "import", {"file": "x.jsonl"}, [probe("held out")], "imported from x")
    history.save(tmp_path, "mine", rows("a", "b"), made_by="row 2 added")
    return tmp_path


def test_an_edit_is_a_new_version_and_the_old_one_stays(folder: Path) -> None:
    assert agree(folder) == ["a", "b"]
    assert answers(folder / "data/versions/mine/1.jsonl") == ["a"]
    with open_db(folder) as db:
        new, old = datasets.versions(db, "mine")
    assert (new.number, new.parent, new.made_by, new.num_rows) == (2, 1, "row 2 added", 2)
    assert (old.number, old.parent, old.made_by, old.kind) == (1, 0, "imported from x", "import")
    dataset = current(folder)
    assert dataset.origin == {"file": "x.jsonl", "edited": True} and dataset.num_probes == 1 and dataset.version == 2
    assert "held out" in (folder / "data/mine.probes.jsonl").read_text()


def test_undo_goes_back_one_change_at_a_time(folder: Path) -> None:
    history.save(folder, "mine", rows("a", "b", "c"))
    assert (history.undo(folder, "mine").version, agree(folder)) == (4, ["a", "b"])
    assert (history.undo(folder, "mine").version, agree(folder)) == (5, ["a"])
    with pytest.raises(DataError, match="Nothing is left to undo"):
        history.undo(folder, "mine")
    history.save(folder, "mine", rows("a", "z"))
    assert (history.undo(folder, "mine").version, agree(folder)) == (7, ["a"])
    with open_db(folder) as db:
        assert datasets.version(db, "mine", 4).made_by == "undo of version 3: edited"


def test_any_version_can_be_restored(folder: Path) -> None:
    history.save(folder, "mine", rows("new"), "general", {"base": "starter"})
    assert not (folder / "data/mine.probes.jsonl").exists() and current(folder).num_probes == 0
    back = history.restore(folder, "mine", 1)
    assert agree(folder) == ["a"] and (back.version, back.kind, back.num_probes) == (4, "import", 1)
    assert "held out" in (folder / "data/mine.probes.jsonl").read_text() and back.origin == {"file": "x.jsonl"}
    (folder / "data/mine.jsonl").write_text("edited by hand")
    assert answers(folder / "data/versions/mine/1.jsonl") == ["a"]
    with pytest.raises(DataError, match="is the current one"):
        history.restore(folder, "mine", 4)
    with pytest.raises(DataError, match=r"no version 9.*4, 3, 2, 1"):
        history.restore(folder, "mine", 9)


def test_a_save_on_a_stale_version_is_refused(folder: Path) -> None:
    history.save(folder, "mine", rows("first window"), expected=2)
    for change in (
        lambda: history.save(folder, "mine", rows("second window"), expected=2),
        lambda: history.undo(folder, "mine", expected=2),
        lambda: history.restore(folder, "mine", 1, expected=2),
    ):
        with pytest.raises(DataError, match="made to version 2, but the dataset is at version 3"):
            change()
    assert agree(folder) == ["first window"] and current(folder).version == 3


def test_an_edit_needs_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset 'mine'"):
        history.save(tmp_path, "mine", rows("a"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_rows_that_fail_half_way_change_nothing(folder: Path) -> None:
    def failing() -> Iterator[Conversation]:
        yield from rows("x")
        raise DataError("row 2 cannot be read")

    with pytest.raises(DataError, match="row 2"):
        history.save(folder, "mine", failing())
    assert agree(folder) == ["a", "b"]
    assert sorted(path.name for path in (folder / "data/versions/mine").iterdir()) == ["1.jsonl", "1.probes.jsonl"]


def test_two_writers_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "WAIT_SECONDS", 0.2)

    def meanwhile() -> Iterator[Conversation]:
        code = f"""
from pathlib import Path
from studio.store import dataset_versions as history
history.WAIT_SECONDS = 0.2
history.undo(Path({str(folder)!r}), "mine")
"""
        other = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
        assert "is being written by another window" in other.stderr
        yield from rows("mine")

    history.save(folder, "mine", meanwhile())
    assert agree(folder) == ["mine"]


CRASHING = """
import os, signal, sys
from pathlib import Path
from studio.data.formats import Conversation, Message
from studio.store import dataset_versions as history
from studio.store import datasets

folder, action, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
moments = 0

def counted(real):
    def call(*args, **kwargs):
        global moments
        result = real(*args, **kwargs)
        moments += 1
        if moments == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for module, name in [(os, "replace"), (os, "link"), (datasets, "put"), (history, "remove"), (history, "_move_in"),
                     (Path, "unlink")]:
    setattr(module, name, counted(getattr(module, name)))
rows = [Conversation((Message("user", "q"), Message("assistant", "new")))]
if action == "edit":
    history.save(folder, "mine", rows)
elif action == "anew":
    history.save(folder, "mine", rows, "general", {}, [{"messages": [], "kind": "general"}] * 2)
elif action == "without probes":
    history.save(folder, "mine", rows, "general")
else:
    history.undo(folder, "mine")
"""


@pytest.mark.parametrize("action", ["edit", "anew", "without probes", "undo"])
def test_kill_at_any_moment_leaves_files_and_database_agreeing(folder: Path, action: str) -> None:
    """The process is killed after each of its file operations in turn, until it gets through."""
    seen = set()
    for moment in range(1, 40):
        before, version = agree(folder), current(folder).version
        words = [sys.executable, "-c", CRASHING, str(folder), action, str(moment)]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        after, dataset = agree(folder), current(folder)
        assert dataset.version in (version, version + 1)
        assert (after == before) == (dataset.version == version)
        probes = folder / "data/mine.probes.jsonl"
        assert len(probes.read_text().splitlines() if probes.exists() else []) == dataset.num_probes
        seen.add((done.returncode, dataset.version - version))
        if done.returncode == 0:
            break
        if dataset.version != version:
            history.save(folder, "mine", rows("a"), "import", {"file": "x.jsonl"}, [probe("held out")])
            history.save(folder, "mine", rows("a", "b"))
    assert seen == {(-signal.SIGKILL, 0), (-signal.SIGKILL, 1), (0, 1)}


def test_a_deleted_dataset_leaves_nothing_and_may_come_again(folder: Path) -> None:
    old = current(folder)
    history.delete(folder, "mine")
    assert not list((folder / "data").rglob("*.jsonl"))
    history.save(folder, "mine", rows("other"), "import")
    assert agree(folder) == ["other"] and current(folder).version == 1
    with pytest.raises(DataError, match="deleted and made anew"):
        history.rows_file(folder, "mine", 1, old.fingerprint)


def test_the_file_of_a_version(folder: Path) -> None:
    with open_db(folder) as db:
        first = datasets.version(db, "mine", 1)
    assert answers(history.rows_file(folder, "mine", 1, first.fingerprint)) == ["a"]
    assert answers(history.rows_file(folder, "mine")) == ["a", "b"]
    os.unlink(folder / "data/mine.jsonl")
    with pytest.raises(DataError, match="is gone"):
        history.rows_file(folder, "mine")


def test_what_was_there_before_versions_becomes_version_1(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        db.execute("drop table dataset_versions")
        db.execute("drop table lint_results")
        db.execute("alter table datasets drop column version")
        db.execute("delete from _sqlite_migrations where name = 'm002_dataset_versions'")
        db.execute("insert into datasets values ('old', 'import', 'data/old.jsonl', 'f', 3, 0, '{}', '2026-01-01')")
    with open_db(tmp_path) as db:
        assert {each.name for each in migrations.applied(db)} == {each.name for each in migrations.all()}
        [version] = datasets.versions(db, "old")
        assert (version.number, version.num_rows, version.parent) == (1, 3, 0)
        assert datasets.get(db, "old").version == 1
