"""A run learns from the rows that it began with, whatever becomes of its datasets."""

from collections.abc import Callable

import pytest

from studio import datasets, runs
from studio.config.schema import RunConfig
from studio.engine.checkpoint import load_pth
from studio.errors import DataError
from studio.paths import sha256_of
from studio.projects import Project
from studio.store import dataset_versions
from tests.engine.conftest import conversations, train_here

Make = Callable[..., RunConfig]


@pytest.fixture
def started(training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that was started, and whose process has not begun yet."""
    monkeypatch.setattr(runs, "_start_training", lambda *args, **options: None)
    config = tiny_config(**{"train.num_steps": 2, "record.sample_prompts": [], "record.save_every_steps": 1})
    run, _ = runs.start_run(training_project, config)
    return run.id


def test_edits_after_the_start_do_not_reach_the_run(training_project: Project, started: str) -> None:
    first = sha256_of(training_project.path("data", "identity.jsonl"))
    datasets.save(training_project, "identity", conversations(6, "garden"))
    assert train_here(training_project, started).state == "finished"
    saved = load_pth(training_project.path("runs", started, "step_2.pth"))
    assert saved["data"]["fingerprints"]["identity"] == first
    assert train_here(training_project, started, resume=f"runs/{started}/step_1.pth").state == "finished"
    assert sha256_of(training_project.path("data", "identity.jsonl")) != first


def test_a_dataset_that_was_made_anew_is_not_trained_under_the_old_name(
    training_project: Project, started: str
) -> None:
    datasets.delete(training_project, "identity")
    dataset_versions.save(training_project.folder, "identity", conversations(6, "garden"), "import")
    ended = train_here(training_project, started)
    assert ended.state == "failed" and "deleted and made anew" in ended.cause


def test_a_version_that_is_not_there(training_project: Project) -> None:
    with pytest.raises(DataError, match="no version 7"):
        dataset_versions.rows_file(training_project.folder, "identity", 7)
