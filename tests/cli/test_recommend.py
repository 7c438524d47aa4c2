"""`retune recommend` and `compare`: the rule's choice with its reason; what differs; tables, JSON, files."""

import json
from pathlib import Path

import pytest

from studio.projects import Project
from studio.store import open_db
from studio.store import runs as store_runs
from tests.cli.conftest import Retune
from tests.scored import add_run, card, hits, store


@pytest.fixture
def evaluated(project: Project) -> Project:
    with open_db(project.folder) as db:
        for run_id in ("lora-1", "tutorial-1"):
            store_runs.add(db, store_runs.Run(run_id, "lora", "starter", "lora", step=20))
        store(db, card(10, hits(36, 40), hits(1, 40)), card(20, hits(38, 40), hits(0, 40)))
        store(db, card(20, hits(40, 40), hits(39, 40), loss=24.0, run_id="tutorial-1"))
    return project


def test_a_checkpoint_is_recommended_with_its_reason(evaluated: Project, retune: Retune) -> None:
    said = retune("recommend", "lora-1")
    assert "lora-1 step 10 (identity 90.0 %, leakage 2.5 %) is the earliest that meets the targets of the best" in said
    row = next(line for line in said.splitlines() if "recommended" in line)
    assert row.split()[:2] == ["lora-1", "10"]


def test_tutorial_mode_is_overfitted_with_figures(evaluated: Project, retune: Retune) -> None:
    said = retune("recommend", "tutorial-1")
    assert "None can be recommended: all are overfitted" in said
    assert "says who it is in 39 of 40 unrelated answers: 97.5 % (95 %: 87.1 % to 99.6 %)" in said


def test_json_has_figures_and_sentence(evaluated: Project, retune: Retune) -> None:
    told = json.loads(retune("recommend", "lora-1", "tutorial-1", "--json"))
    assert told["chosen"]["step"] == 10 and told["best"]["step"] == 20 and told["behind"][1] < 0
    assert [each["overfit"]["verdict"] for each in told["candidates"]] == ["sound", "sound", "overfitted"]
    assert told["runs"]["lora-1"] == {"is_overfitted": False, "sentence": ""}
    assert told["runs"]["tutorial-1"]["is_overfitted"]
    assert told["runs"]["tutorial-1"]["sentence"].startswith("tutorial-1 is overfitted at step 20, its only scored")


def test_what_is_not_scored_says_how(project: Project, retune: Retune) -> None:
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora", step=20))
    assert "Score its checkpoints first: retune evaluate lora-1" in retune("recommend", "lora-1")
    assert "no run 'nope'" in retune("recommend", "nope", code=1)


def test_runs_are_compared_and_written_to_one_file(project: Project, retune: Retune, tmp_path: Path) -> None:
    add_run(project, "lora-1", [], {"identity": 1})
    add_run(project, "lora-2", ["lora.rank=8"], {"identity": 2})
    with open_db(project.folder) as db:
        store(db, card(10, hits(36, 40), hits(1, 40)), card(10, hits(38, 40), hits(0, 40), run_id="lora-2"))
    said = retune("compare", "lora-1", "lora-2", "--report", tmp_path / "both.html")
    assert "lora.rank" in said and "2 (abababababab)" in said and "train.learning_rate" not in said
    assert "Failures (5)" in (tmp_path / "both.html").read_text(encoding="utf-8")
    told = json.loads(retune("compare", "lora-1", "lora-2", "--json", "--report", tmp_path / "both.md"))
    assert told["settings"] == [{"name": "lora.rank", "values": ["16", "8"]}]
    assert told["scorecards"]["lora-2"]["step"] == 10
    assert "## Failures (5)" in (tmp_path / "both.md").read_text(encoding="utf-8")
    assert "Allowed endings: .html" in retune("compare", "lora-1", "--report", tmp_path / "x.pdf", code=1)
