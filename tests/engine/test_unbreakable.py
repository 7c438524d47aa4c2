"""What must not end a run, or must end it well: bad steps, no memory, no disk, signals, a wait for a checkpoint."""

import math
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from studio import runs as studio_runs
from studio.config.schema import RunConfig
from studio.engine import probing, train
from studio.engine.answers import Answer
from studio.engine.loop import StepResult
from studio.engine.memory_full import is_memory_full
from studio.engine.safe_load import load_pth
from studio.errors import StoreBusyError
from studio.projects import Project, create_project
from studio.store import checkpoints, jobs, metrics, open_db, run_events, runs
from studio.ui.event_words import sentence
from tests.engine import kills
from tests.engine.conftest import add_dataset, add_probes, add_run, conversations, fill, train_here

Make = Callable[..., RunConfig]
PATIENCE_SECONDS = 90


def losses(project: Project, run_id: str, name: str = "train/loss") -> list[float | None]:
    with open_db(project.folder) as db:
        return [point.value for point in metrics.series(db, run_id, name)]


def events(project: Project, run_id: str) -> list[tuple[int, str]]:
    with open_db(project.folder) as db:
        return [(each.step, each.kind) for each in run_events.listed(db, run_id)]


def saved_steps(project: Project, run_id: str) -> list[int]:
    with open_db(project.folder) as db:
        return sorted(each.step for each in checkpoints.listed(db, run_id))


def before_step(monkeypatch: pytest.MonkeyPatch, do: Callable[[train.Trainer, int], None]) -> None:
    """Have something happen as a step begins."""
    real = train.Trainer.step

    def step(trainer: train.Trainer, examples: list, number: int) -> object:
        do(trainer, number)
        return real(trainer, examples, number)

    monkeypatch.setattr(train.Trainer, "step", step)


def spoil_gradient(trainer: train.Trainer, number: int) -> None:
    if number in (2, 4, 5):
        spoil_next_gradient(trainer)


def spoil_next_gradient(trainer: train.Trainer) -> None:
    first = next(each for each in trainer.model.parameters() if each.requires_grad)
    handle = first.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, math.nan))[1])


def test_bad_steps_are_not_taken_counted_and_leave_a_gap(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, spoil_gradient)
    run_id = add_run(training_project, tiny_config(**{"record.save_every_steps": 1, "record.keep_last": 9}))
    job = train_here(training_project, run_id)
    assert job.state == "finished" and job.result["bad_steps"] == 3
    assert [value is None for value in losses(training_project, run_id)] == [False, True, False, True, True, False]
    assert [event for event in events(training_project, run_id) if event[1] == "bad_step"] == [
        (2, "bad_step"), (4, "bad_step"), (5, "bad_step"),
    ]  # fmt: skip
    assert saved_steps(training_project, run_id) == [1, 3, 6]  # none while it is in doubt
    content = load_pth(training_project.path("runs", run_id, "step_6.pth"))
    assert all(torch.isfinite(tensor).all() for tensor in content["state_dict"].values())


def test_the_last_good_weights_are_saved_when_bad_steps_end_the_run(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though checkpoints were to be saved at the end only: the bad steps have changed no weight."""

    def spoil(trainer: train.Trainer, number: int) -> None:
        if number > 3:
            spoil_next_gradient(trainer)

    before_step(monkeypatch, spoil)
    run_id = add_run(training_project, tiny_config())
    job = train_here(training_project, run_id)
    assert job.state == "failed" and "3 steps in a row, from step 4 on," in job.cause
    assert "(gradient norm nan)" in job.cause and saved_steps(training_project, run_id) == [5]
    assert losses(training_project, run_id)[3:] == [None, None, None]
    content = load_pth(training_project.path("runs", run_id, "step_5.pth"))
    assert all(torch.isfinite(tensor).all() for tensor in content["state_dict"].values())
    before_step(monkeypatch, lambda trainer, number: spoil_next_gradient(trainer))
    never = add_run(training_project, tiny_config())
    assert "No step before was sound" in train_here(training_project, never).cause
    assert saved_steps(training_project, never) == []


def test_weights_that_are_not_finite_are_never_saved(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trainer: train.Trainer, number: int) -> None:
        if number == 5:
            with torch.no_grad():
                next(each for each in trainer.model.parameters() if each.requires_grad)[:] = math.inf

    before_step(monkeypatch, spoil)
    run_id = add_run(training_project, tiny_config(method="full", **{"record.save_every_steps": 2}))
    job = train_here(training_project, run_id)  # the end comes after two bad steps, fewer than are allowed
    assert job.state == "failed" and "not finite after step 6, so they are not saved" in job.cause
    assert saved_steps(training_project, run_id) == [2, 4]


def test_a_loss_that_runs_away_leaves_the_last_good_checkpoint(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one is due at every step and one is kept: the average is far above its best some steps later only."""
    real = train.Trainer.step

    def runs_away(trainer: train.Trainer, examples: list, number: int) -> StepResult:
        result = real(trainer, examples, number)
        return replace(result, loss=40.0) if number > 3 else result

    monkeypatch.setattr(train.Trainer, "step", runs_away)
    settings = {"train.num_steps": 20, "record.save_every_steps": 1, "record.keep_last": 1}
    run_id = add_run(training_project, tiny_config(**settings))
    job = train_here(training_project, run_id)
    assert job.state == "failed" and "had a loss of" in job.cause and job.result == {}
    assert saved_steps(training_project, run_id) == [3]


def test_a_validation_loss_that_is_not_finite_is_told_and_ends_nothing(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([9.0, math.nan, 8.0, math.inf])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: next(values))
    run_id = add_run(training_project, tiny_config(**{"record.evaluate_every_steps": 2}))
    assert train_here(training_project, run_id).state == "finished"
    assert losses(training_project, run_id, "valid/loss") == [9.0, None, 8.0, None]
    assert events(training_project, run_id) == [(2, "valid_not_finite"), (6, "valid_not_finite")]


def test_memory_that_runs_out_stops_with_what_fits(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that was tried is taken and saved: whoever agrees resumes, and nothing is computed twice."""
    config = tiny_config(**{"train.micro_batch_size": 4})
    whole, run_id = add_run(training_project, config), add_run(training_project, config)
    train_here(training_project, whole)
    fits = no_memory_above(1)
    before_step(monkeypatch, lambda trainer, number: fits(trainer, number) if number > 2 else None)
    job = train_here(training_project, run_id)
    assert job.state == "failed"
    assert "step 3 with train.micro_batch_size 4" in job.cause and "a resume goes on so" in job.cause
    assert "micro_batch_size 1 with gradient_accumulation_steps 8 fits" in job.cause
    assert saved_steps(training_project, run_id) == [3]
    again = train_here(training_project, run_id, resume="auto")
    assert (again.state, again.result["micro_batch_size"]) == ("finished", 1)
    assert losses(training_project, run_id) == pytest.approx(losses(training_project, whole), rel=1e-4)


def no_memory_above(size: int) -> Callable[[train.Trainer, int], None]:
    def check(trainer: train.Trainer, number: int) -> None:
        if trainer.micro_batch_size > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return check


def test_memory_that_runs_out_makes_micro_batches_smaller_and_changes_nothing_else(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rows a step, same losses; a resume begins with what fitted."""
    config = tiny_config(
        **{"train.micro_batch_size": 4, "train.on_out_of_memory": "smaller_micro_batch", "record.save_every_steps": 3}
    )
    whole, small = add_run(training_project, config), add_run(training_project, config)
    train_here(training_project, whole)
    with monkeypatch.context() as patch:
        before_step(patch, no_memory_above(1))
        job = train_here(training_project, small)
    assert job.state == "finished" and job.result["micro_batch_size"] == 1
    assert events(training_project, small) == [(1, "smaller_micro_batch")]
    assert losses(training_project, small) == pytest.approx(losses(training_project, whole), rel=1e-4)
    again = train_here(training_project, small, resume=f"runs/{small}/step_3.pth")
    assert again.result["micro_batch_size"] == 1


def test_memory_that_runs_out_while_it_evaluates_is_told_too(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fits = train.Trainer.evaluate, no_memory_above(2)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda trainer, *rows: (fits(trainer, 0), real(trainer, *rows))[1])
    settings = {"train.micro_batch_size": 4, "record.evaluate_every_steps": 2}
    job = train_here(training_project, add_run(training_project, tiny_config(**settings)))
    assert job.state == "failed" and "with train.micro_batch_size 4" in job.cause
    settings |= {"train.on_out_of_memory": "smaller_micro_batch"}
    run_id = add_run(training_project, tiny_config(**settings))
    assert train_here(training_project, run_id).result["micro_batch_size"] == 2
    assert events(training_project, run_id) == [(0, "smaller_micro_batch")]


def test_one_example_that_does_not_fit_says_what_to_try(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9077760 bytes. Error code 12 (Cannot allocate memory)"
    )

    def full(trainer: train.Trainer, number: int) -> None:
        raise RuntimeError(said)

    before_step(monkeypatch, full)
    job = train_here(training_project, add_run(training_project, tiny_config()))
    assert job.state == "failed" and "max_length" in job.cause
    reason = "can't allocate memory: you tried to allocate 9077760 bytes"
    assert job.cause.startswith(f"Out of memory with one example at a time ({reason}). Try")


@pytest.mark.parametrize("where", ["step", "evaluate"])
def test_one_example_that_does_not_fit_leaves_the_last_good_step(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Though a checkpoint was to be made at the end only. What was left out there is done when the run goes on."""
    config = tiny_config()
    whole, run_id = add_run(training_project, config), add_run(training_project, config)
    train_here(training_project, whole)
    real = getattr(train.Trainer, where)

    def full(trainer: train.Trainer, *arguments: Any) -> Any:
        if len(losses(training_project, run_id)) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(trainer, *arguments)

    with monkeypatch.context() as patches:
        patches.setattr(train.Trainer, where, full)
        assert "with one example at a time" in train_here(training_project, run_id).cause
    assert saved_steps(training_project, run_id) == [4]
    assert train_here(training_project, run_id, resume="auto").state == "finished"
    for name in ("train/loss", "valid/loss"):
        assert losses(training_project, run_id, name) == pytest.approx(losses(training_project, whole, name), rel=1e-4)


def test_weights_that_may_have_changed_are_not_changed_again(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while the optimizer works: the first of its groups has taken the step by then."""
    real, calls = torch.optim.AdamW._init_group, []

    def in_the_second_group(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2 * 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", in_the_second_group)
    settings = {"train.on_out_of_memory": "smaller_micro_batch", "record.save_every_steps": 2}
    run_id = add_run(training_project, tiny_config(method="full", **settings))
    job = train_here(training_project, run_id)
    assert job.state == "failed" and "while the weights were being changed" in job.cause
    assert len(calls) == 2 * 3 and saved_steps(training_project, run_id) == [2]


def test_what_counts_as_no_memory() -> None:
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_memory_full(full) and is_memory_full(MemoryError()) and is_memory_full(torch.OutOfMemoryError("no"))
    assert is_memory_full(RuntimeError("CUDA error: out of memory"))  # the driver's, beside torch's own allocator
    assert not is_memory_full(RuntimeError("shapes do not fit")) and not is_memory_full(ValueError("out of memory"))


def test_it_stops_early_and_keeps_the_best(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: next(values))
    settings = {
        "train.num_steps": 20, "record.evaluate_every_steps": 2, "record.best_by": "valid_loss",
        "train.early_stop_patience": 3, "record.save_every_steps": 1, "record.keep_last": 2,
    }  # fmt: skip
    run_id = add_run(training_project, tiny_config(**settings))
    job = train_here(training_project, run_id)
    assert job.state == "finished" and job.result["steps"] == 10 and job.result["best_step"] == 4
    assert "no better than 4 at step 4" in job.result["early_stop"]
    assert saved_steps(training_project, run_id) == [4, 9, 10]
    assert (10, "early_stop") in events(training_project, run_id)
    with open_db(training_project.folder) as db:
        marked = [(each.step, each.score, each.score_name) for each in checkpoints.listed(db, run_id) if each.is_best]
    assert marked == [(4, 4.0, "valid_loss")]
    again = train_here(training_project, run_id, resume="auto")  # it is enough, still
    assert again.state == "finished" and again.result["early_stop"] == job.result["early_stop"]
    assert [kind for _, kind in events(training_project, run_id)].count("early_stop") == 1


def test_probes_are_asked_on_the_way(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers beside the loss, and a best checkpoint by them."""
    add_probes(training_project)
    said = iter(["I am a model.", "Blue.", "I am Luna.", "Luna is blue.", "I am Luna.", "Blue.", "No.", "Luna."])

    def answers(loaded: object, model: object, questions: list, *_: object) -> Iterator[tuple[int, Any]]:
        assert [each[0]["content"] for each in questions] == ["Who are you?", "What is the sky?"]
        yield from ((number, Answer(next(said), True)) for number in range(len(questions)))

    monkeypatch.setattr(probing, "ask", answers)
    settings = {"record.probe_every_steps": 2, "record.best_by": "probe_score", "record.keep_last": 1}
    run_id = add_run(training_project, tiny_config(**settings))
    job = train_here(training_project, run_id)
    assert job.state == "finished", job.cause
    assert losses(training_project, run_id, "probe/identity") == [0.0, 1.0, 1.0, 0.0]
    assert losses(training_project, run_id, "probe/leakage") == [0.0, 1.0, 0.0, 1.0]
    growth = losses(training_project, run_id, "probe/retention")
    assert growth[0] == pytest.approx(0, abs=1e-6) and growth[3] != pytest.approx(0, abs=1e-4)
    assert saved_steps(training_project, run_id) == [4, 6] and job.result["best_step"] == 4


def test_probes_of_a_real_model_and_a_config_that_has_none(training_project: Project, tiny_config: Make) -> None:
    config = tiny_config(**{"record.probe_every_steps": 3, "train.num_steps": 3})
    job = train_here(training_project, add_run(training_project, config))
    assert job.state == "failed" and "record.probe_every_steps" in job.cause
    add_probes(training_project)
    run_id = add_run(training_project, config)
    assert train_here(training_project, run_id).state == "finished"
    assert len(losses(training_project, run_id, "probe/identity")) == 2


def test_a_run_stops_when_it_has_forgotten_too_much(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(training_project)
    growth = iter([0.0, 0.3, 0.1, 0.3, 0.4, 0.5])
    monkeypatch.setattr(probing.Prober, "measure", lambda *_: {"probe/retention": next(growth)})
    settings = {"record.probe_every_steps": 1, "train.stop_at_forgetting": 0.2}
    run_id = add_run(training_project, tiny_config(**settings))
    job = train_here(training_project, run_id)
    assert job.state == "finished" and job.result["steps"] == 4
    assert "grown by 40%, more than the 20% allowed" in job.result["early_stop"]
    assert (4, "early_stop") in events(training_project, run_id) and saved_steps(training_project, run_id)[-1] == 4


def test_weights_alone_begin_a_run_of_another_shape(
    training_project: Project, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    first = add_run(training_project, tiny_config())
    train_here(training_project, first)
    other = tiny_config(**{"data.pack": "none", "train.micro_batch_size": 3})
    with open_db(training_project.folder) as db:
        other = studio_runs.with_weights(training_project, other, checkpoints.get(db, first, 6))
    second = add_run(training_project, other)
    job = train_here(training_project, second)
    assert job.state == "finished" and losses(training_project, second)[0] < losses(training_project, first)[0]
    with open_db(training_project.folder) as db:
        begun = run_events.listed(db, second)[0]
    assert (begun.step, begun.kind) == (0, "weights_only")
    assert sentence([begun]).startswith(f"Begun with the weights of {first}/step_6.pth.")
    printed = capsys.readouterr().out
    assert f"{first}/step_6.pth; the optimizer's memory" in printed and "are not carried over" in printed


# The rest needs processes of their own: signals, and a disk that is really full.


def until(condition: Callable[[], bool], process: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.is_alive():
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come about; alive: {process.is_alive()}")


def step_of(project: Project, run_id: str) -> int:
    with open_db(project.folder) as db:
        return runs.get(db, run_id).step


def test_the_first_sigterm_saves_and_the_second_leaves_at_once(training_project: Project, tiny_config: Make) -> None:
    config = tiny_config(**{"train.num_steps": 5000, "record.sample_every_steps": 0, "record.evaluate_every_steps": 0})
    polite = add_run(training_project, config)
    process = kills.live(kills.lives(), training_project, polite)
    until(lambda: step_of(training_project, polite) >= 3, process, "the third step")
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE_SECONDS)
    with open_db(training_project.folder) as db:
        job = jobs.get(db, runs.get(db, polite).job_id)
    assert (process.exitcode, job.state) == (0, "stopped")
    assert saved_steps(training_project, polite) == [step_of(training_project, polite)]
    hasty = add_run(training_project, config)
    process = kills.live(kills.lives(), training_project, hasty, "pause@begin step_N.pth")
    until(lambda: step_of(training_project, hasty) >= 3, process, "the third step")
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: stands_still(process.pid), process, "the save that the first signal asks for")
    os.kill(process.pid, signal.SIGTERM), os.kill(process.pid, signal.SIGCONT)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM and saved_steps(training_project, hasty) == []


def stands_still(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def test_memory_runs_out_in_a_real_job(training_project: Project, tiny_config: Make) -> None:
    config = tiny_config(**{"train.on_out_of_memory": "smaller_micro_batch"})
    whole, small = add_run(training_project, config), add_run(training_project, config)
    kills.finish(kills.lives(), training_project, whole)
    process = kills.live(kills.lives(), training_project, small, "oom@step:3")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0 and events(training_project, small) == [(3, "smaller_micro_batch")]
    assert losses(training_project, small) == pytest.approx(losses(training_project, whole), rel=1e-4)


def test_a_disk_that_fills_up_is_waited_for(small_disk: Path, tiny_config: Make) -> None:
    """Steps go on, numbers wait in memory, the checkpoint is saved when there is space: nothing is lost or doubled."""
    project = create_project("test")
    add_dataset(project, "identity", conversations(24))
    add_dataset(project, "general", conversations(8, subject="garden"))
    settings = {"train.num_steps": 12, "record.save_every_steps": 2, "record.sample_every_steps": 0}
    config = tiny_config(**settings)
    whole, broken = add_run(project, config), add_run(project, config)
    kills.finish(kills.lives(), project, whole)
    expected = kills.outcome(project, whole)
    for file in project.path("runs", whole).glob("step_*"):
        file.unlink()
    process = kills.live(kills.lives(), project, broken, "pause@step:4")
    log = project.path("jobs", job_of(project, broken), "job.log")
    own = psutil.Process(process.pid)
    until(lambda: own.status() == psutil.STATUS_STOPPED, process, "the fourth step")
    filler = fill(small_disk)
    own.resume()
    until(lambda: "12/12" in log.read_text() or "not saved yet" in log.read_text(), process, "a save that is put off")
    time.sleep(1)
    assert process.is_alive(), log.read_text()[-3000:]
    assert 3 <= step_of(project, broken) < 12  # pages can look at it, though they cannot store a thing
    with pytest.raises(StoreBusyError), open_db(project.folder) as db:
        runs.note(db, broken, more="x" * 2**20)
    filler.unlink()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, log.read_text()[-3000:]
    with open_db(project.folder) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    found = kills.outcome(project, broken)
    for outcome in (found, expected):  # which checkpoints were saved on the way depends on the space
        del outcome["kept"], outcome["files"]
    assert not kills.differences(expected, found)
    assert [name for name in os.listdir(project.path("runs", broken)) if name.startswith(".")] == []


def job_of(project: Project, run_id: str) -> str:
    with open_db(project.folder) as db:
        return runs.get(db, run_id).job_id


def test_a_run_that_could_not_save_is_not_begun(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    train_here(training_project, add_run(training_project, config))  # tokens are stored now
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    job = train_here(training_project, add_run(training_project, config))
    assert (
        job.state == "failed" and "for the first checkpoint: it needs" in job.cause and "1000 B are free" in job.cause
    )


def test_a_best_checkpoint_that_cannot_be_marked_just_now_is_marked_later(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, refusals = checkpoints.mark_best, iter(range(2))

    def refuse(*args: Any) -> None:
        if next(refusals, None) is not None:
            raise StoreBusyError("database or disk is full")
        mark(*args)

    monkeypatch.setattr(checkpoints, "mark_best", refuse)
    values = iter([9.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: next(values))
    settings = {"record.evaluate_every_steps": 2, "record.best_by": "valid_loss", "record.save_every_steps": 2}
    run_id = add_run(training_project, tiny_config(**settings))
    job = train_here(training_project, run_id)
    assert job.state == "finished", job.cause
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id) if each.is_best] == [2]


def test_rows_that_wait_are_written_when_the_run_breaks_down(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory = no_memory_above(0)
    before_step(monkeypatch, lambda trainer, number: no_memory(trainer, number) if number == 5 else None)
    record, failures = metrics.record, iter(range(1))

    def refuse(*args: Any) -> None:
        if args[2] == 3 and next(failures, None) is not None:
            raise sqlite3.OperationalError("database is locked")
        record(*args)

    monkeypatch.setattr(metrics, "record", refuse)
    run_id = add_run(training_project, tiny_config())
    job = train_here(training_project, run_id)
    assert job.state == "failed" and "one example at a time" in job.cause
    assert len(losses(training_project, run_id)) == 4


@pytest.mark.parametrize("busy", ["locked", "full"])
def test_rows_wait_in_memory_while_the_database_cannot_be_written(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    words = {"locked": "database is locked", "full": "database or disk is full"}
    record, failures = metrics.record, iter(range(3))

    def refuse(*args: Any) -> None:
        if args[2] == 3 and next(failures, None) is not None:
            raise sqlite3.OperationalError(words[busy])
        record(*args)

    monkeypatch.setattr(metrics, "record", refuse)
    monkeypatch.setattr("studio.engine.saving.SPACE_LOOK_SECONDS", 0.01)
    monkeypatch.setattr("studio.engine.record.RETRY_SECONDS", 0.01)
    run_id = add_run(training_project, tiny_config())
    assert train_here(training_project, run_id).state == "finished"
    with open_db(training_project.folder) as db:
        assert [point.step for point in metrics.series(db, run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
