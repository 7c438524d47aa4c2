"""What benchmarks/train.py makes of its rounds."""

import random
from typing import Any

import pytest

from benchmarks.training import figures
from benchmarks.training.workloads import WORKLOADS


def a_round(setting: str, number: int, seconds: float, losses: list[float], tokens: int = 100) -> dict[str, Any]:
    counts = dict.fromkeys(("effective", "real", "trained", "computed"), tokens)
    sizes = {"cpu_seconds": 2 * seconds, "peak_bytes": 1000 + number, "tokens": counts}
    return {"setting": setting, "round": number, "seconds": seconds, "losses": losses, "load": [0.0, 0.0], **sizes}


@pytest.fixture
def workload() -> dict[str, Any]:
    """The studio is 4, 2 and 1 times as fast as the peer, which reaches 1.0 with its last step."""
    ours = [(0, 9.0, [4.0]), (1, 1.0, [3.0, 2.0]), (2, 2.0, [1.0, 1.0]), (3, 4.0, [1.0, 1.0])]
    theirs = [(0, 9.0, [4.0]), (1, 4.0, [3.0, 2.5]), (2, 4.0, [1.0, 1.0]), (3, 4.0, [1.0, 1.0])]
    rounds = [a_round(figures.OURS, *each) for each in ours]
    rounds += [a_round(figures.BASE_LINE, *each) for each in theirs]
    rounds.append(a_round("trl default", 1, 50.0, [3.1, 2.0]))
    return {"rounds": rounds, "target": 1.5, "failures": {}, "complete": True}


def test_speeds_are_medians_without_the_warm_up(workload: dict[str, Any]) -> None:
    first, second, third = figures.rows(workload)
    assert [first.name, second.name, third.name] == [figures.OURS, figures.BASE_LINE, "trl default"]
    assert (first.effective, second.effective, first.per_cpu_second) == (50.0, 25.0, 25.0)
    assert (first.num_rounds, first.num_steps, first.peak_bytes) == (3, 7, 1003)
    assert second.ours_times == (2.0, 1.0, 4.0)
    assert third.ours_times == (50.0, 50.0, 50.0)


def test_the_promise_is_measured_at_the_fastest_peer(workload: dict[str, Any]) -> None:
    verdict = figures.verdict(workload)
    assert verdict is not None
    assert (verdict.best_peer, verdict.times, verdict.is_fast) == (figures.BASE_LINE, (2.0, 1.0, 4.0), True)
    assert (verdict.is_lean, verdict.leanest_peer) == (False, "trl default")
    assert figures.verdict({**workload, "rounds": workload["rounds"][:4]}) is None


def test_time_to_a_loss_counts_the_warm_up(workload: dict[str, Any]) -> None:
    ours, theirs, other = figures.rows(workload)
    assert figures.target_loss(workload) == 1.0
    assert (ours.target_seconds, theirs.target_seconds, other.target_seconds) == (9 + 1 + 2 + 2, 9 + 4 + 4 + 2, None)


def test_losses_are_compared_step_by_step(workload: dict[str, Any]) -> None:
    assert figures.largest_difference(workload, figures.OURS, figures.BASE_LINE) == (0.5, 7)
    assert figures.largest_difference(workload, figures.OURS, "trl best") is None


def test_rows_are_the_same_for_the_same_seed() -> None:
    for workload in WORKLOADS:
        first, second = (workload.rows(random.Random(0)) for _ in range(2))
        assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]
