"""Checkpoints that the time makes: when one is due, who says so, and that a killed run goes on from it bit-equal."""

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from studio.config.schema import RunConfig
from studio.engine.distributed import Alone
from studio.engine.saving import TIMES_A_SAVE, Saver, SaveTimer
from studio.projects import Project
from studio.store import checkpoints, open_db
from tests.engine import kills
from tests.engine.conftest import add_run, train_here

Make = Callable[..., RunConfig]
BY_TIME = {"record.save_every_minutes": 1e-9}  # the first step is saved; how many of the others, the machine says


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def timer_of(minutes: float) -> tuple[SaveTimer, Clock]:
    clock = Clock()
    return SaveTimer(minutes, clock), clock


def save(timer: SaveTimer, clock: Clock, seconds: float) -> None:
    timer.begin()
    clock.seconds += seconds
    timer.end()


def test_the_first_is_due_so_many_minutes_after_training_began() -> None:
    timer, clock = timer_of(2)
    clock.seconds += 600  # loading
    timer.start()
    clock.seconds += 119
    assert not timer.is_due()
    clock.seconds += 1
    assert timer.is_due()


def test_the_next_is_due_so_many_minutes_after_the_last_one_whatever_that_was_made_for() -> None:
    timer, clock = timer_of(2)
    clock.seconds += 100
    save(timer, clock, 1)
    clock.seconds += 119
    assert not timer.is_due()
    clock.seconds += 1
    assert timer.is_due()


def test_saving_takes_a_small_share_of_the_time() -> None:
    timer, clock = timer_of(2)
    save(timer, clock, 30)
    clock.seconds += 30 * TIMES_A_SAVE - 1
    assert not timer.is_due()
    clock.seconds += 1
    assert timer.is_due()
    save(timer, clock, 1)
    clock.seconds += 120
    assert timer.is_due()


def test_a_save_that_failed_puts_none_off() -> None:
    timer, clock = timer_of(2)
    clock.seconds += 120
    timer.begin()
    clock.seconds += 50
    assert timer.is_due()


def test_none_is_due_by_time_at_0_minutes() -> None:
    timer, clock = timer_of(0)
    clock.seconds += 10**9
    assert not timer.is_on and not timer.is_due()


class Second(Alone):
    """The second of two processes; the first has said `said`."""

    world, rank = 2, 1
    said: Any = None

    def share(self, value: Any) -> Any:
        return self.said


def test_what_is_due_is_the_first_process_s_word() -> None:
    """A clock of its own would have one process save alone, and wait for ever for the others."""
    ranks, (timer, clock) = Second(), timer_of(2)
    parts: dict[str, Any] = dict.fromkeys(("checkpoints", "recorder", "requests", "health", "best", "phase"))
    saver = Saver(trainer=cast(Any, SimpleNamespace(ranks=ranks)), timer=timer, **parts)
    ranks.said = True
    assert saver.is_due()
    ranks.said, clock.seconds = False, clock.seconds + 1000
    assert timer.is_due() and not saver.is_due()


def test_killed_after_a_checkpoint_that_the_time_made_it_goes_on_bit_equal(
    training_project: Project, tiny_config: Make
) -> None:
    context, settings = kills.lives(), {"lora.dropout": 0.1, "train.num_steps": 8}
    whole = add_run(training_project, tiny_config(**settings))
    kills.finish(context, training_project, whole)
    broken = add_run(training_project, tiny_config(**settings, **BY_TIME))
    process = kills.live(context, training_project, broken, "kill@step:4")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    [newest, *_] = saved_steps(training_project, broken)
    assert 1 <= newest <= 3
    kills.finish(context, training_project, broken)
    outcomes = [kills.outcome(training_project, run_id) for run_id in (whole, broken)]
    for part in ("numbers", "said", "state"):
        assert not kills.differences(outcomes[0][part], outcomes[1][part]), part


def test_checkpoints_that_the_time_made_rotate(training_project: Project, tiny_config: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(SaveTimer, "is_due", lambda timer: timer.is_on)
    run_id = add_run(training_project, tiny_config(**BY_TIME))
    assert train_here(training_project, run_id).state == "finished"
    assert saved_steps(training_project, run_id) == [6, 5]


def saved_steps(project: Project, run_id: str) -> list[int]:
    with open_db(project.folder) as db:
        return [each.step for each in checkpoints.listed(db, run_id)]
