"""`retune data import`: at once or by a job, any kind of file, columns by hand."""

import json
from pathlib import Path

import pytest

from studio import datasets
from studio.data.formats import ALL_FORMATS
from studio.projects import Project
from tests.cli.conftest import Retune


@pytest.fixture(autouse=True)
def a_project(project: object) -> None:
    """Every command here works on the newest project."""


def test_columns_by_hand_and_by_their_names(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "Medication.csv"
    file.write_text("Drug,Asked,Said\nx,how much?,ask a doctor\n", encoding="utf-8")
    assert "columns named like" in retune("data", "import", file, code=1)
    words = ("--columns", "question=Asked,answer=Said")
    assert retune("data", "import", file, *words) == "medication: 1 row\n"
    assert "no column 'Told'" in retune("data", "import", file, "--columns", "question=Asked,answer=Told", code=1)


def test_what_was_recognised_is_said(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "gb.csv"
    file.write_text("编号,患者提问,医生回复\n" + "1,头疼怎么办？,多休息。\n" * 6, encoding="gb18030")
    assert retune("data", "import", file) == (
        "gb: 6 rows\nRead as question_answer, 50% sure: column '患者提问' is named like a question and '医生回复' like "
        "an answer.\nIts encoding was recognised as gb18030; --encoding names another.\n"
    )


def test_a_reason_that_all_rows_share_is_said_once(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "drugs.csv"
    file.write_text("Drug,Asked\n" + "x,how much?\n" * 30, encoding="utf-8")
    said = retune("data", "import", file, code=1)
    assert said.count("its keys are") == 1 and "all 30 rows: the format is not recognised" in said
    assert "--columns question=" in said and "keep-good" not in said


def test_what_an_import_replaces_is_said_and_can_be_taken_back(
    retune: Retune, project: Project, tmp_path: Path
) -> None:
    file = tmp_path / "identity.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n", encoding="utf-8")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 20)
    said = retune("data", "import", file)
    assert "identity, 20 rows" in said and "retune data undo identity" in said
    retune("data", "undo", "identity")
    back = datasets.get(project, "identity")
    assert (back.num_rows, back.kind) == (20, "identity") and back.num_probes > 0


def test_a_large_file_is_imported_by_a_job(
    retune: Retune, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "AT_ONCE_BYTES", 100)
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(50)]
    file.write_text("\n".join(map(json.dumps, [*rows, {"x": 1}])), encoding="utf-8")
    said = retune("data", "import", file, code=1)
    assert "1 of 51 rows cannot be used" in said and "row 51" in said
    said = retune("data", "import", file, "--keep-good")
    assert "reading" in said and "rows: 50 rows\nRead as instruction, 93% sure: " in said
    assert datasets.get(project, "rows").num_rows == 50


def test_a_folder_of_texts(retune: Retune, project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "Books"
    folder.mkdir()
    (folder / "one.txt").write_text("Once.", encoding="utf-8")
    (folder / "two.md").write_text("# Twice", encoding="utf-8")
    assert retune("data", "import", folder) == (
        'books: 2 rows\nRead as text, 90% sure: it has "text" and no question.\n'
    )
    assert [row.kind for row in datasets.load(project, "books")] == ["text", "text"]


def test_formats_are_listed_with_their_columns(retune: Retune) -> None:
    listed = json.loads(retune("data", "formats", "--json"))
    assert set(listed) == set(ALL_FORMATS) and listed["sql"] == ["context", "question", "answer"]
    assert "Unknown format 'x'" in retune("data", "import", __file__, "--format", "x", code=1)
