"""A run that is killed and resumed ends bit-equal to one that was never interrupted: real processes, real signals."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio import jobs, runs
from studio.config.schema import RunConfig
from studio.engine.safe_load import load_pth
from studio.projects import Project
from studio.store import metrics, open_db, samples
from studio.store import runs as store_runs
from studio.store.jobs import Job

NUM_STEPS = 48
EXACT = ("train/loss", "train/learning_rate", "train/grad_norm", "train/trained_tokens", "valid/loss")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_and_resumed_is_bit_equal(
    training_project: Project, tiny_config: Callable[..., RunConfig], method: str
) -> None:
    settings = {"train.num_steps": NUM_STEPS, "record.save_every_steps": 5, "record.evaluate_every_steps": 4}
    config = tiny_config(method=method, **settings, **{"lora.dropout": 0.1})
    whole, job = runs.start_run(training_project, config)
    runs.wait(training_project.folder, job, 800)

    broken, job = runs.start_run(training_project, config)
    chance = random.Random(method)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        interrupt(training_project, broken.id, job, chance.randint(3, 12), chance.random() * 0.02, how)
        job = runs.resume_run(training_project, broken.id)
    ended = runs.wait(training_project.folder, job, 800)

    assert ended.state == "finished" and ended.result["steps"] == NUM_STEPS
    assert final(training_project, broken.id) == final(training_project, whole.id)
    weights = [load_pth(training_project.path("runs", each.id, f"step_{NUM_STEPS}.pth")) for each in (whole, broken)]
    for part in ("state_dict", "optimizer", "rng", "data", "schedule"):
        assert same(weights[0][part], weights[1][part]), part


def interrupt(project: Project, run_id: str, job: Job, num_steps: int, delay_seconds: float, how: int) -> None:
    """Signal the run's process some steps after where it starts, at no particular point of a step."""
    first = None
    while first is None or step_of(project, run_id) < first + num_steps:
        current = jobs.get(project.folder, job.id)
        assert current.live, f"the run ended before it could be interrupted: {current.state} {current.cause}"
        if current.phase == "training" and first is None:
            first = step_of(project, run_id)
        time.sleep(0.01)
    time.sleep(delay_seconds)
    os.kill(current.pid, how)
    while jobs.get(project.folder, job.id).live:
        time.sleep(0.02)
    assert step_of(project, run_id) < NUM_STEPS


def step_of(project: Project, run_id: str) -> int:
    with open_db(project.folder) as db:
        return store_runs.get(db, run_id).step


def final(project: Project, run_id: str) -> dict[str, Any]:
    """Every number and sample of a run that does not measure time or memory."""
    with open_db(project.folder) as db:
        numbers = {name: [(point.step, point.value) for point in metrics.series(db, run_id, name)] for name in EXACT}
        said = [(sample.step, sample.prompt, sample.text, sample.error) for sample in samples.listed(db, run_id)]
    assert [step for step, _ in numbers["train/loss"]] == list(range(1, NUM_STEPS + 1))
    return {"numbers": numbers, "samples": said}


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, in nested containers."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other
