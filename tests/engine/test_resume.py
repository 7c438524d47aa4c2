"""A run that is killed and resumed ends bit-equal to one that was never interrupted: real processes, real signals."""

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from studio import faults, jobs, runs
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
    training_project: Project, tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = {"train.num_steps": NUM_STEPS, "record.save_every_steps": 5, "record.evaluate_every_steps": 4}
    config = tiny_config(method=method, **settings, **{"lora.dropout": 0.1})
    whole, job = runs.start_run(training_project, config)
    runs.wait(training_project.folder, job, 800)

    chance, broken = random.Random(method), None
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        monkeypatch.setenv(faults.FAULT, f"pause@step:{chance.randint(4, 13)}")
        if broken is None:
            broken, job = runs.start_run(training_project, config)
        else:
            job = runs.resume_run(training_project, broken.id)
        interrupt(training_project, job, chance.random() * 0.02, how)
        assert step_of(training_project, broken.id) < NUM_STEPS
    monkeypatch.delenv(faults.FAULT)
    job = runs.resume_run(training_project, broken.id)
    ended = runs.wait(training_project.folder, job, 800)

    assert ended.state == "finished" and ended.result["steps"] == NUM_STEPS
    assert final(training_project, broken.id) == final(training_project, whole.id)
    weights = [load_pth(training_project.path("runs", each.id, f"step_{NUM_STEPS}.pth")) for each in (whole, broken)]
    for part in ("state_dict", "optimizer", "rng", "data", "schedule"):
        assert same(weights[0][part], weights[1][part]), part


def interrupt(project: Project, job: Job, delay_seconds: float, how: int) -> None:
    """Signal the run's process a moment after it has begun the step before which it waits, at no particular point."""
    while True:
        current = jobs.get(project.folder, job.id)
        assert current.live, f"the run ended before it could be interrupted: {current.state} {current.cause}"
        process = psutil.Process(current.pid)
        if current.phase == "training" and process.status() == psutil.STATUS_STOPPED:
            break
        time.sleep(0.01)
    process.resume()
    time.sleep(delay_seconds)
    process.send_signal(how)
    while jobs.get(project.folder, job.id).live:
        time.sleep(0.02)


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
