"""Overfitted is said of what training did, beyond chance, however many checkpoints are looked through."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import overfit
from studio.overfit import judged, overfitting, signs
from studio.probes import paired
from tests.scored import card, hits

NOTHING = {"increase": None, "low": None, "high": None, "num_tokens": 0}


def leaks(gained: int, lost: int, both: int, total: int) -> dict[str, Any]:
    """A scorecard with so many general questions, on which the tuned model alone, the base alone, or both leak."""
    pairs = [(False, True)] * gained + [(True, False)] * lost + [(True, True)] * both
    pairs += [(False, False)] * (total - len(pairs))
    return {
        "identity": paired.sides([]), "leakage": paired.sides(pairs), "retention": NOTHING, "changed": paired.rate([])
    }  # fmt: skip


@st.composite
def cards(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 60))
    gained = draw(st.integers(0, total))
    lost = draw(st.integers(0, total - gained))
    return leaks(gained, lost, draw(st.integers(0, total - gained - lost)), total)


def share_of(number: int, total: int, chance: float) -> float:
    return math.comb(total, number) * chance**number * (1 - chance) ** (total - number)


@pytest.mark.parametrize("total", [12, 30, 40, 120])
@pytest.mark.parametrize("looks", [1, 10])
def test_a_run_that_leaks_no_more_than_is_wanted_is_seldom_called_overfitted(total: int, looks: int) -> None:
    """Each checkpoint leaks 5 %, the base never: one of them is called overfitted in less than one run in twenty."""
    sound = [signs(leaks(0, 0, 0, total))] * (looks - 1)
    called = [judged([signs(leaks(each, 0, 0, total)), *sound])[0].verdict == "overfitted" for each in range(total + 1)]
    assert looks * sum(share_of(each, total, 0.05) for each in range(total + 1) if called[each]) < 0.05
    assert called == sorted(called) and called[-1]


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_a_model_that_says_it_as_often_as_the_base_and_elsewhere_is_seldom_called_overfitted(rate: float) -> None:
    """A name that is a common word: all answers are worded anew, and some say it that did not, as others no longer."""
    total, one_way = 30, rate * (1 - rate)
    chance = 0.0
    for gained in range(total + 1):
        for lost in range(total - gained + 1):
            still = total - gained - lost
            ways = math.comb(total, gained) * math.comb(total - gained, lost)
            likely = ways * one_way ** (gained + lost) * (1 - 2 * one_way) ** still
            both = min(still, round(still * rate))
            if likely > 1e-9 and overfitting(leaks(gained, lost, both, total)).verdict == "overfitted":
                chance += likely
    assert chance < 0.05


@given(cards(), st.lists(cards(), max_size=9))
def test_who_looks_at_more_checkpoints_is_never_surer_of_one(one: dict[str, Any], others: list[dict[str, Any]]) -> None:
    among = judged([signs(each) for each in (one, *others)])[0]
    if among.verdict == "overfitted":
        assert overfitting(one).verdict == "overfitted"
    assert (among.verdict == "sound") == (overfitting(one).verdict == "sound")


@given(st.integers(1, 60), st.data())
def test_another_leak_makes_nobody_less_sure(total: int, data: st.DataObject) -> None:
    gained = data.draw(st.integers(0, total - 1))
    both = data.draw(st.integers(0, total - 1 - gained))
    order = ["sound", "unclear", "overfitted"]
    fewer, more = (overfitting(leaks(each, 0, both, total)).verdict for each in (gained, gained + 1))
    assert order.index(fewer) <= order.index(more)


@given(cards())
def test_overfitted_means_more_than_is_wanted_and_more_than_the_base(values: dict[str, Any]) -> None:
    sides, found = values["leakage"], overfitting(values)
    if found.verdict == "overfitted":
        assert sides["tuned"]["low"] > 0.05 and sides["tuned"]["rate"] > sides["base"]["rate"]
        assert sides["difference"]["gained"] > sides["difference"]["lost"]
    assert (found.verdict == "sound") == (sides["tuned"]["rate"] <= max(0.05, sides["base"]["rate"]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_corrects_in_order_and_no_more_than_bonferroni(chances: list[float]) -> None:
    corrected = paired.holm(chances)
    pairs = sorted(zip(chances, corrected, strict=True))
    assert [each for _, each in pairs] == sorted(corrected)
    assert all(chance <= each <= min(1.0, len(chances) * chance) + 1e-12 for chance, each in pairs)
    assert pairs[0][1] == min(1.0, len(chances) * pairs[0][0])


def test_holm_against_published_figures() -> None:
    """Holm 1979 by hand, as R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") has it."""
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([]) == []


def test_four_leaks_in_thirty_may_be_chance() -> None:
    """A checkpoint of the builder's default run: the base leaks once too, by its answer to a question that says it."""
    sound = [signs(leaks(0, 0, 1, 30))] * 9
    four = judged([signs(leaks(3, 0, 1, 30)), *sound])[0]
    assert four.verdict == "unclear"
    assert four.suspicions[0].sentence == (
        "4 of 30 unrelated answers say who it is, 1 of the base's. That may be chance: 95 % is 5.3 % to 29.7 %, and "
        "training that does no harm gets there in 12.5 % of such tests. It is one of 10 checkpoints that were scored."
    )
    seven, eight = (judged([signs(leaks(each, 0, 0, 30)), *sound])[0] for each in (7, 8))
    assert (seven.verdict, eight.verdict) == ("unclear", "overfitted")
    assert overfitting(leaks(7, 0, 0, 30)).verdict == "overfitted"


def test_a_run_that_is_spoilt_throughout_is_told_though_one_of_it_alone_would_not_be() -> None:
    """What is beyond doubt elsewhere leaves fewer looks to correct for: Holm's, where Bonferroni's would not tell."""
    spoilt = [signs(leaks(27, 0, 1, 30))] * 8
    found = judged([signs(leaks(7, 0, 0, 30)), signs(leaks(0, 0, 1, 30)), *spoilt])
    assert [each.verdict for each in found] == ["overfitted", "sound"] + ["overfitted"] * 8


def test_two_of_forty_may_be_chance_and_eight_of_forty_is_not() -> None:
    few, many = overfitting(leaks(3, 0, 0, 40)), overfitting(leaks(8, 0, 0, 40))
    assert overfitting(leaks(2, 0, 0, 40)).verdict == "sound"
    assert few.verdict == "unclear" and "may be chance: 95 % is 2.6 % to 19.9 %" in few.suspicions[0].sentence
    assert many.verdict == "overfitted"
    assert many.suspicions[0].sentence == (
        "It says who it is in 8 of 40 unrelated answers: 20.0 % (95 %: 10.5 % to 34.8 %); the base in 0."
    )


def test_what_the_base_says_by_itself_is_not_overfitting() -> None:
    assert overfitting(leaks(0, 0, 20, 40)).verdict == "sound"
    assert overfitting(leaks(6, 4, 16, 40)).verdict == "unclear"


def test_a_scorecard_of_before_pairs_were_counted_has_a_verdict() -> None:
    values = leaks(12, 0, 1, 40)
    del values["leakage"]["difference"]
    assert overfitting(values).verdict == "overfitted"


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 10))
def test_forgetting_is_told_with_its_interval_and_never_of_a_few_questions(number: int, looks: int) -> None:
    """Every reference is predicted twice as badly, so the bootstrap's interval is a point. Leakage is a look too."""
    evaluation, _ = card(1, [True], hits(0, number), loss=10 + 10 * math.log(2))
    found = judged([signs(evaluation.scores)] * looks)[0]
    assert (found.verdict == "overfitted") == (2 * looks * 0.5**number < 0.05)
    assert "grew by 100.0 %" in found.suspicions[0].sentence


def test_what_was_not_measured_has_no_verdict() -> None:
    assert overfitting(leaks(0, 0, 0, 0)) == overfit.Overfit("unmeasured")
