"""Each config that ships validates; those for the starter model are trained for two steps by the real job."""

import pytest

from studio import datasets, runs
from studio.config.catalog import preset, preset_names
from studio.config.yaml import with_settings
from studio.data.formats import Conversation, Message
from studio.data.identity import Identity
from studio.projects import Project
from studio.store import checkpoints, metrics, open_db

FAST = [
    "train.num_steps=2", "train.warmup_steps=1", "train.micro_batch_size=2", "train.gradient_accumulation_steps=1",
    "record.sample_max_new_tokens=4", "record.evaluate_every_steps=1", "data.max_length=64",
]  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_after_its_file_and_validates(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert config.train.num_steps is None or config.train.warmup_steps < config.train.num_steps / 2


def test_there_is_a_preset_for_each_method() -> None:
    assert {preset(name).method for name in preset_names()} == {"lora", "qlora", "full"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in preset_names() if preset(name).model.base == "starter"])
def test_a_preset_for_the_starter_trains(name: str, project: Project, starter: object) -> None:
    datasets.build_identity(project, Identity(name="Luna", maker="Shane"), num_rows=24)
    general = [
        Conversation((Message("user", f"Say {n}."), Message("assistant", f"{n}, as you wish.")), {}) for n in range(8)
    ]
    datasets.save(project, "general", general, kind="general")
    run, job = runs.start_run(project, with_settings(preset(name), FAST))
    done = runs.wait(project.folder, job, timeout_seconds=400)
    assert done.state == "finished"
    with open_db(project.folder) as db:
        losses = metrics.series(db, run.id, "train/loss")
        saved = checkpoints.listed(db, run.id)
    assert [point.step for point in losses] == [1, 2] and all(0 < (point.value or 0) < 15 for point in losses)
    assert [checkpoint.step for checkpoint in saved] == [2]
