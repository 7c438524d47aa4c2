"""Tokens are made once, in whatever process, and are those that the preview shows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from studio import caches, datasets, jobs, models, row_life, runs
from studio.config.schema import RunConfig
from studio.data import cache
from studio.data.token_files import TokenFiles
from studio.data.tokens import IGNORE_INDEX, Example
from studio.errors import ModelError
from studio.projects import Project
from studio.store.jobs import Job
from tests.engine.conftest import add_dataset, conversations

Make = Callable[..., RunConfig]


def ended(project: Project, job: Job) -> Job:
    return list(jobs.watch(project.folder, job.id, 0.1))[-1]


def previewed(project: Project, name: str, config: RunConfig) -> list[Example]:
    """The tokens that the Data page shows for each row of a dataset."""
    found = []
    view = row_life.View(
        models.require(config.model.base), config.data.template, config.data.max_length, config.data.loss_on
    )
    for row in range(1, datasets.get(project, name).num_rows + 1):
        life = row_life.of_dataset(project, name, row, view)
        labels = [token.id if token.trained else IGNORE_INDEX for token in life.tokens]
        found.append(Example([token.id for token in life.tokens], labels, life.truncated))
    return found


def stored(project: Project) -> dict[str, list[Example]]:
    """The tokens in the project's caches, by dataset."""
    found = {}
    for info in caches.listed(project):
        files = TokenFiles(project.path(cache.FOLDER, info.key), info.dtype)
        found[info.dataset] = [files.row(row) for row in range(files.num_rows)]
    return found


@pytest.mark.parametrize("settings", [{}, {"data.max_length": 20}, {"data.loss_on": "last"}], ids=str)
def test_the_preview_shows_what_the_trainer_trains(
    training_project: Project, tiny_config: Make, settings: dict
) -> None:
    """This process previews, a process of its own trains; both meet in the tokens that the trainer left."""
    config = tiny_config(**{"train.num_steps": 2, "record.sample_prompts": []} | settings)
    _, job = runs.start_run(training_project, config)
    assert ended(training_project, job).state == "finished"
    tokens = stored(training_project)
    assert tokens == {name: previewed(training_project, name, config) for name in ("identity", "general")}
    assert any(example.truncated for example in tokens["identity"]) == ("data.max_length" in settings)


def test_a_run_finds_the_tokens_that_a_job_made(training_project: Project, tiny_config: Make) -> None:
    config = tiny_config(**{"train.num_steps": 2, "record.sample_prompts": []})
    job = ended(training_project, caches.start(training_project, config.data, config.model.base))
    assert job.state == "finished" and (job.current, job.total, job.unit) == (32, 32, "rows")
    made = {each["dataset"]: each["key"] for each in job.result["caches"]}
    assert set(made) == {"identity", "general"} == {info.dataset for info in caches.listed(training_project)}
    before = [info.created_at for info in caches.listed(training_project)]
    _, job = runs.start_run(training_project, config)
    assert ended(training_project, job).state == "finished"
    assert [info.created_at for info in caches.listed(training_project)] == before


def test_a_dataset_that_changed_is_tokenised_again(training_project: Project, tiny_config: Make) -> None:
    config = tiny_config(**{"data.sources": {"general": 1}})
    for rows in (8, 9):
        add_dataset(training_project, "general", conversations(rows))
        job = ended(training_project, caches.start(training_project, config.data, config.model.base))
        assert job.result["caches"][0]["num_rows"] == rows
    assert len(caches.listed(training_project)) == 2
    caches.delete(training_project, job.result["caches"][0]["key"])
    assert caches.delete_all(training_project) > 0 and not caches.listed(training_project)


def test_a_missing_base_is_said_at_once(training_project: Project, tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        caches.start(training_project, tiny_config().data, str(tmp_path / "nothing"))
