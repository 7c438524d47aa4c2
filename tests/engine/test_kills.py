"""Killed at every fault point and at random moments, a run ends bit-equal to one that was left alone."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.config.schema import RunConfig
from studio.projects import Project
from studio.store import open_db, runs
from tests.engine import kills
from tests.engine.conftest import add_run

SETTINGS = {
    "train.num_steps": 40,
    "record.save_every_steps": 2,
    "record.evaluate_every_steps": 2,
    "record.sample_every_steps": 2,
    "record.best_by": "valid_loss",
    "lora.dropout": 0.1,
}
EXPECTED = {
    "begin", "write", "fsync", "rename", "fsync folder", "end",  # of files
    "row checkpoint", "rotate row", "rotate file", "rotate manifest", "rotate end",
    "commit metrics", "end metrics", "commit samples", "end samples",
}  # fmt: skip


@pytest.mark.timeout(600)
def test_killed_at_every_fault_point(
    training_project: Project, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """One run that dies at one point after the other, at each once, and goes on in between."""
    context, config = kills.lives(), tiny_config(**SETTINGS)
    whole = add_run(training_project, config)
    kills.live(context, training_project, whole, trace=tmp_path / "trace").join(120)
    points = kills.points_of(tmp_path / "trace")
    assert {name.split(" step_")[0].split(" last_")[0] for name in points} >= EXPECTED
    assert {"rename step_N.pth", "rename step_N.manifest.json", "rename last_checkpoint"} <= points.keys()
    broken = add_run(training_project, config)
    for point in points:
        process = kills.live(context, training_project, broken, f"kill@{point}")
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (point, process.exitcode)
    kills.finish(context, training_project, broken)
    assert not kills.differences(kills.outcome(training_project, whole), kills.outcome(training_project, broken))


@pytest.mark.timeout(300)
def test_killed_at_random_moments(training_project: Project, tiny_config: Callable[..., RunConfig]) -> None:
    context, config = kills.lives(), tiny_config(**SETTINGS | {"train.num_steps": 16})
    whole = add_run(training_project, config)
    kills.finish(context, training_project, whole)
    broken, chance = add_run(training_project, config), random.Random(1)
    for _ in range(4):
        process = kills.live(context, training_project, broken)
        wanted = step_of(training_project, broken) + chance.randint(1, 5)
        while process.is_alive() and step_of(training_project, broken) < min(wanted, 15):
            time.sleep(0.005)
        process.kill()
        process.join()
    kills.finish(context, training_project, broken)
    assert not kills.differences(kills.outcome(training_project, whole), kills.outcome(training_project, broken))


def step_of(project: Project, run_id: str) -> int:
    with open_db(project.folder) as db:
        return runs.get(db, run_id).step
