"""Datasets of a project: every change is a version, also from the shell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studio import datasets, row_life
from studio.data.conversation import Conversation, Message
from studio.data.identity import Identity
from studio.errors import DataError
from studio.projects import Project


def row(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def answers(project: Project, name: str = "mine", version: int = 0) -> list[str]:
    return [each.messages[-1].content for each in datasets.load(project, name, version)]


@pytest.fixture
def mine(project: Project, tmp_path: Path) -> Project:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{n}", "output": f"a{n}"}) + "\n" for n in range(3)))
    datasets.import_file(project, file)
    return project


def test_an_imported_file_is_never_changed(mine: Project) -> None:
    [source] = [path for path in mine.path("data", "source").rglob("*") if path.is_file()]
    before = source.read_bytes()
    datasets.edit_row(mine, "mine", 2, row("q1", "better"), 1)
    datasets.edit_row(mine, "mine", 1, None, 2)
    datasets.undo(mine, "mine")
    assert source.read_bytes() == before and answers(mine) == ["a0", "better", "a2"]
    told = [(each.number, each.made_by) for each in datasets.versions(mine, "mine")]
    assert told == [
        (4, "undo of version 3: row 1 deleted"), (3, "row 1 deleted"), (2, "row 2 edited"),
        (1, "imported from mine.jsonl"),
    ]  # fmt: skip
    assert answers(mine, version=1) == ["a0", "a1", "a2"] and answers(mine, version=3) == ["better", "a2"]


def test_two_windows_that_edit_the_same_version(mine: Project) -> None:
    seen = datasets.get(mine, "mine").version
    datasets.edit_row(mine, "mine", 1, row("q0", "first window"), seen)
    with pytest.raises(DataError, match="made to version 1, but the dataset is at version 2"):
        datasets.edit_row(mine, "mine", 1, row("q0", "second window"), seen)
    assert answers(mine) == ["first window", "a1", "a2"]
    with pytest.raises(DataError, match="no row 9"):
        datasets.edit_row(mine, "mine", 9, None, 2)


def test_an_identity_built_anew_can_be_taken_back_with_its_probes(project: Project) -> None:
    datasets.build_identity(project, Identity("Luna", "Shane"), 20)
    datasets.build_identity(project, Identity("Max", "Ada"), 30)
    assert "Max" in json.dumps(datasets.load_probes(project, "identity"))
    back = datasets.undo(project, "identity")
    assert back.num_rows == 20 and back.origin["identity"]["name"] == "Luna"
    probes = datasets.load_probes(project, "identity")
    assert "Max" not in json.dumps(probes) and len(probes) == back.num_probes > 0


def test_probes_may_hold_any_character(project: Project) -> None:
    probes = [{"prompt": "one\u2028two\x85three"}]
    datasets.save(project, "odd", [row("q", "a")], "import", {"file": "x"}, probes)
    assert datasets.load_probes(project, "odd") == probes


def test_streaming_gives_the_rows_and_names_a_damaged_one(mine: Project) -> None:
    assert list(datasets.stream(mine, "mine")) == datasets.load(mine, "mine")
    path = mine.path("data", "mine.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match="row 4"):
        list(datasets.stream(mine, "mine"))


def test_raw_rows_go_with_the_versions_that_know_them(project: Project, tmp_path: Path) -> None:
    """An edit keeps those of its import, a second import has its own, and what nobody knows is cleared away."""
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"Who? {number}", "answer": "Luna"} for number in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first = datasets.import_file(project, file, "mine")
    edited = datasets.edit_row(project, "mine", 1, None, first.version)
    assert edited.origin["raw"] == first.origin["raw"]
    part = row_life.raw_of(project, edited, datasets.load(project, "mine")[0])
    assert part.rows[0].value == rows[1] and part.rows[0].number == 2
    changed = Conversation((Message("user", "Who?"), Message("assistant", "Nova")))
    assert row_life.raw_of(project, edited, changed).missing == row_life.EDITED
    assert row_life.raw_of(project, replace(edited, kind="identity"), changed).missing == row_life.BUILT
    (project.folder / "data/raw/mine/left-over").mkdir()
    second = datasets.import_file(project, file, "mine")
    there = {path.name for path in (project.folder / "data/raw/mine").iterdir()}
    assert there == {Path(each.origin["raw"]).name for each in (first, second)}
    datasets.delete(project, "mine")
    assert not (project.folder / "data/raw/mine").exists()
