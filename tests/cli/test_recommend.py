"""`retune recommend`: the rule's choice with its reason, as a table and as JSON."""

import json

import pytest

from studio.projects import Project
from studio.store import open_db
from studio.store import runs as store_runs
from tests.cli.conftest import Retune
from tests.scored import card, hits, store


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


def test_what_is_not_scored_says_how(project: Project, retune: Retune) -> None:
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora", step=20))
    assert "Score its checkpoints first: retune evaluate lora-1" in retune("recommend", "lora-1")
    assert "no run 'nope'" in retune("recommend", "nope", code=1)
