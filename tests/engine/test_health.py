"""When a training counts as broken down, which measurement is the best, and when nothing gets better any more."""

import math

import pytest

from studio.config.schema import parse_config
from studio.engine.best import Best
from studio.engine.health import BrokeDownError, Health
from studio.errors import ConfigError


def health(**settings: float) -> Health:
    return Health.of(parse_config({"train": settings}).train)


def test_bad_steps_in_a_row_end_the_run_and_single_ones_do_not() -> None:
    watch = health(max_bad_steps=3)
    for step in (1, 2, 4, 5):
        watch.bad_step(step, "loss nan")
        assert watch.suspicious
        if step == 2:
            watch.good_step(3, 1.0)
            assert not watch.suspicious
    with pytest.raises(BrokeDownError, match="3 steps in a row, from step 4 on,.*loss nan.*unharmed") as broke:
        watch.bad_step(6, "loss nan")
    assert "train.learning_rate (now 0.0005)" in broke.value.hint and watch.num_bad == 5


def test_when_no_step_was_sound_the_learning_rate_is_not_to_blame() -> None:
    watch = health(max_bad_steps=1)
    with pytest.raises(BrokeDownError, match="step 1 had no finite loss.*No step before was sound") as broke:
        watch.bad_step(1, "loss nan")
    assert "base model" in broke.value.hint and "learning_rate" not in broke.value.hint and not watch.has_learnt


def run_losses(watch: Health, losses: list[float]) -> int:
    """The step that ended it; 0 when none did."""
    for step, loss in enumerate(losses, start=1):
        try:
            watch.good_step(step, loss)
        except BrokeDownError:
            return step
    return 0


def test_a_loss_that_runs_away_ends_the_run() -> None:
    falling, away = [3 * 0.8**n for n in range(20)], [1.0 * 1.8**n for n in range(12)]
    assert 20 < run_losses(health(), falling + away) < 32
    assert run_losses(health(divergence_factor=0), falling + away) == 0


@pytest.mark.parametrize(
    "losses",
    [
        [3 * 0.7**n for n in range(40)] + [0.5, 0.02, 1.2, 0.01, 2.5, 0.03] * 4,  # learnt by heart, some rows are new
        [2.0, 0.4, 3.1, 0.9, 2.7, 0.3, 2.9] * 10,  # one row a step
        [1.0] * 50,
    ],
)
def test_noise_is_no_divergence(losses: list[float]) -> None:
    assert run_losses(health(), losses) == 0


def test_what_was_counted_goes_on_after_a_resume() -> None:
    losses = [3 * 0.8**n for n in range(20)] + [1.0 * 1.8**n for n in range(12)]
    whole = run_losses(health(), losses)
    first, second = health(), health()
    assert run_losses(first, losses[:22]) == 0
    second.restore(first.state())
    assert run_losses(second, losses[22:]) + 22 == whole


def best(measure: str, patience: int = 0) -> Best:
    record = {"best_by": measure, "probe_every_steps": 1}
    return Best.of(parse_config({"record": record, "train": {"early_stop_patience": patience}}))


def test_the_best_is_the_lowest_loss_or_the_highest_score() -> None:
    lowest, highest = best("valid_loss"), best("probe_score")
    assert not lowest.see("valid_loss", 5, math.inf) and lowest.value is None
    assert not lowest.see("valid_loss", 0, 3.0)  # before the first step there is nothing to save
    assert [lowest.see("valid_loss", 5 * n, loss) for n, loss in enumerate((2.0, 2.0, 1.5, math.nan, 1.7), 1)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert (lowest.step, lowest.value, lowest.kept) == (15, 1.5, (15,))
    assert [highest.see("probe_score", n, score) for n, score in enumerate((0.1, 0.5, 0.4), 1)] == [True, True, False]
    assert not highest.see("valid_loss", 9, -9.0)


def test_patience_counts_measurements_without_a_new_best_over_a_resume() -> None:
    waiting = best("valid_loss", patience=2)
    for step, loss in enumerate((2.0, 1.0, 1.1), 1):
        waiting.see("valid_loss", step, loss)
    assert not waiting.should_stop
    resumed = best("valid_loss", patience=2)
    resumed.restore(waiting.state())
    resumed.see("valid_loss", 4, 1.0)
    assert resumed.should_stop and "no better than 1 at step 2" in resumed.why_stopped()


def enough(**train: float) -> Best:
    return Best.of(parse_config({"record": {"probe_every_steps": 1}, "train": train}))


def test_what_was_learnt_twice_in_a_row_is_enough_over_a_resume() -> None:
    first = enough(stop_at_identity=0.9)
    for step, identity in enumerate((1.0, 0.5, 1.0, 0.4, 0.95)):
        first.probed(step, {"probe/identity": identity})
    assert not first.should_stop
    resumed = enough(stop_at_identity=0.9)
    resumed.restore(first.state())
    resumed.probed(5, {"probe/identity": 0.9})
    assert resumed.reason == "learnt" and "90% of the held-out identity" in resumed.why_stopped()


def test_what_was_forgotten_twice_in_a_row_is_too_much() -> None:
    found = enough(stop_at_forgetting=0.2, stop_at_identity=0.9)
    for step, growth in enumerate((0.0, 0.1, 0.3, 0.1, 0.3, 0.4)):
        assert not found.should_stop
        found.probed(step, {"probe/identity": 0.2, "probe/retention": growth})
    assert found.reason == "forgot" and "grown by 40%, more than the 20% allowed" in found.why_stopped()
    assert found.stop_detail()["latest"] == 0.4


def test_the_balance_takes_forgetting_off() -> None:
    found = best("probe_balance")
    assert not found.probed(0, {"probe/identity": 0.0, "probe/leakage": 0.0, "probe/retention": 0.0})
    assert found.probed(1, {"probe/identity": 1.0, "probe/leakage": 0.25, "probe/retention": 0.5})
    assert found.value == 0.25
    assert not found.probed(2, {"probe/identity": 1.0, "probe/leakage": 0.0, "probe/retention": 0.9})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train": {"stop_at_identity": 0.9}}, "probe_every_steps"),
        ({"train": {"stop_at_forgetting": 0.1}}, "probe_every_steps"),
        ({"record": {"best_by": "probe_balance"}}, "probe_every_steps"),
        ({"train": {"early_stop_patience": 2}}, "needs record.best_by"),
        ({"record": {"best_by": "valid_loss", "evaluate_every_steps": 0}}, "evaluate_every_steps"),
        ({"record": {"best_by": "valid_loss"}, "data": {"valid_share": 0}}, "valid_share"),
        ({"record": {"best_by": "probe_score"}}, "probe_every_steps"),
    ],
)
def test_what_is_not_measured_cannot_be_best(values: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(values)


def test_one_loss_that_is_far_away_is_no_moment_to_save() -> None:
    """The average follows some steps later: by then the last good checkpoint would be rotated away."""
    watch = health()
    watch.good_step(1, 3.0)
    watch.good_step(2, 2.9)
    assert not watch.suspicious
    watch.good_step(3, 29.0)
    assert watch.suspicious and not watch.running_away
    watch.good_step(4, 2.8)
    assert not watch.suspicious


def test_a_measurement_that_is_not_finite_brings_no_new_best() -> None:
    waiting = best("valid_loss", patience=2)
    for step, loss in enumerate((2.0, math.nan, math.inf), 1):
        waiting.see("valid_loss", step, loss)
    assert waiting.should_stop and "no better than 2 at step 1" in waiting.why_stopped()
    never = best("valid_loss", patience=1)
    never.see("valid_loss", 1, math.nan)
    assert never.should_stop and never.why_stopped().endswith("in a row were not finite.")
