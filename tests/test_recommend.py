"""Which checkpoint to take: the rule holds for whatever was measured, and few questions give no verdict."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import recommend
from studio.recommend import Candidate, behind, overfitting, paired_difference, pareto
from tests.scored import card, hits, scored

marks = st.lists(st.booleans(), min_size=1, max_size=40)


@st.composite
def checkpoints(draw: st.DrawFn) -> list[Candidate]:
    """Up to six checkpoints that answered the same questions."""
    num_identity, num_general = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    steps = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True))
    return [
        scored(
            step,
            draw(st.lists(st.booleans(), min_size=num_identity, max_size=num_identity)),
            draw(st.lists(st.booleans(), min_size=num_general, max_size=num_general)),
            loss=draw(st.sampled_from([9.0, 10.2, 16.0])),
        )
        for step in steps
    ]


@given(marks, st.data())
def test_a_paired_difference_lies_in_its_interval_and_turns_with_its_sides(first: list[bool], data) -> None:
    second = data.draw(st.lists(st.booleans(), min_size=len(first), max_size=len(first)))
    value, low, high = paired_difference(first, second)
    assert -1 <= low <= value <= high <= 1
    assert value == pytest.approx((sum(first) - sum(second)) / len(first))
    back = paired_difference(second, first)
    assert back == pytest.approx((-value, -high, -low))


@settings(deadline=None, max_examples=25)
@given(checkpoints())
def test_the_recommended_one_is_the_earliest_that_is_not_told_from_the_best(found: list[Candidate]) -> None:
    advice = recommend.recommend(found)
    sound = [each for each in found if each.overfit.verdict != "overfitted"]
    if advice.chosen is None:
        assert not sound or advice.best.identity[0] < recommend.LEARNT
        return
    assert advice.chosen in sound and advice.best.score == max(each.score for each in sound)
    assert behind(advice.chosen, advice.best)[1] <= 0 and advice.chosen.reached >= advice.best.reached
    earlier = [each for each in sound if each.step < advice.chosen.step]
    assert all(behind(each, advice.best)[1] > 0 or advice.best.reached - each.reached for each in earlier)


@settings(deadline=None, max_examples=25)
@given(checkpoints(), st.randoms())
def test_the_order_in_which_checkpoints_come_does_not_matter(found: list[Candidate], random) -> None:
    mixed = random.sample(found, len(found))
    assert recommend.recommend(mixed).chosen == recommend.recommend(found).chosen


@settings(deadline=None, max_examples=25)
@given(checkpoints())
def test_no_one_beats_the_front_and_all_others_are_beaten(found: list[Candidate]) -> None:
    def beats(one: Candidate, other: Candidate) -> bool:
        no_worse = one.identity[0] >= other.identity[0] and one.leakage[0] <= other.leakage[0]
        return no_worse and (one.identity[0], -one.leakage[0]) != (other.identity[0], -other.leakage[0])

    front = pareto(found, lambda each: each.leakage and each.leakage[0])
    assert front
    for each in found:
        if each in front:
            assert not any(beats(other, each) for other in found)
        else:
            assert any(beats(one, each) or _level(one, each) for one in front)


def _level(one: Candidate, other: Candidate) -> bool:
    return (one.identity[0], one.leakage[0]) == (other.identity[0], other.leakage[0])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 20), st.data())
def test_overfitted_is_said_only_above_what_is_wanted_and_beyond_chance(total: int, looks: int, data) -> None:
    leaks = data.draw(st.integers(0, total))
    evaluation, _ = card(1, [True], hits(leaks, total))
    found = overfitting(evaluation.scores, looks)
    low = evaluation.scores["leakage"]["tuned"]["low"]
    assert (found.verdict == "overfitted") == (low > 0.05 and looks * _tail(leaks, total) < 0.05)
    assert (found.verdict == "sound") == (leaks / total <= 0.05)


def _tail(leaks: int, total: int) -> float:
    """How often a model that leaks 5 % does so that often, or more often."""
    return sum(math.comb(total, each) * 0.05**each * 0.95 ** (total - each) for each in range(leaks, total + 1))


@pytest.mark.parametrize("total", [12, 30, 40, 120])
def test_ten_checkpoints_that_leak_no_more_than_is_wanted_are_seldom_called_overfitted(total: int) -> None:
    """At most one run in twenty, though ten are looked at."""
    verdicts = [overfitting(card(1, [True], hits(leaks, total))[0].scores, 10).verdict for leaks in range(total + 1)]
    fewest = verdicts.index("overfitted")
    assert 10 * _tail(fewest, total) < 0.05
    assert verdicts[fewest:] == ["overfitted"] * (total + 1 - fewest)


def test_of_ten_checkpoints_four_leaks_in_thirty_may_be_chance_and_six_are_not() -> None:
    four, six = (overfitting(card(1, [True], hits(leaks, 30))[0].scores, 10) for leaks in (4, 6))
    assert (four.verdict, six.verdict) == ("unclear", "overfitted")
    assert four.signs[0].sentence == (
        "4 of 30 unrelated answers say who it is. That may be chance: 95 % is 5.3 % to 29.7 %, and a model that does "
        "so in 5.0 % gets there in 6.1 % of such tests. It is one of 10 checkpoints that were scored."
    )
    assert overfitting(card(1, [True], hits(5, 30))[0].scores).verdict == "overfitted"
    assert overfitting(card(1, [True], hits(5, 30))[0].scores, 10).verdict == "unclear"


def test_what_the_recommended_one_may_have_lost_is_said_beside_it() -> None:
    advice = recommend.recommend([scored(10, hits(30, 30), hits(4, 30))])
    assert advice.chosen.overfit.verdict == "unclear"
    assert advice.caveat == advice.chosen.overfit.signs[0].sentence


def test_two_of_forty_may_be_chance_and_eight_of_forty_is_not() -> None:
    few, many = (overfitting(card(1, [True], hits(number, 40))[0].scores) for number in (3, 8))
    assert overfitting(card(1, [True], hits(2, 40))[0].scores).verdict == "sound"
    assert few.verdict == "unclear" and "may be chance: 95 % is 2.6 % to 19.9 %" in few.signs[0].sentence
    assert many.verdict == "overfitted"
    assert many.signs[0].sentence == (
        "Overfitted: it says who it is in 8 of 40 unrelated answers: 20.0 % (95 %: 10.5 % to 34.8 %)."
    )


def test_what_the_base_says_by_itself_is_not_overfitting() -> None:
    evaluation, _ = card(1, [True], hits(20, 40))
    values = evaluation.scores
    values["leakage"]["base"] = values["leakage"]["tuned"]
    assert overfitting(values).verdict == "unclear"


def test_forgetting_is_told_with_its_interval() -> None:
    evaluation, _ = card(1, [True], hits(0, 40), loss=10 + 10 * math.log(2))
    [sign] = overfitting(evaluation.scores, 10).signs
    assert sign.sure and "grew by 100.0 % (95 %: 100.0 % to 100.0 %)" in sign.sentence


def test_the_reason_gives_the_figures() -> None:
    found = [scored(10, hits(4, 40), hits(0, 40)), scored(20, hits(37, 40), hits(0, 40))]
    found += [scored(30, hits(38, 40), hits(0, 40)), scored(40, hits(40, 40), hits(30, 40))]
    advice = recommend.recommend(found)
    assert (advice.chosen.step, advice.best.step) == (20, 30)
    assert advice.reason.startswith(
        "lora-1 step 20 (identity 92.5 %, leakage 0.0 %) is the earliest that meets the targets of the best, lora-1 "
        "step 30, and that 80 questions cannot tell from it: 2.5 points behind, 95 %:"
    )


def test_few_questions_do_not_let_a_half_learnt_one_pass() -> None:
    half, whole = scored(10, hits(7, 10), hits(0, 10)), scored(20, hits(10, 10), hits(0, 10))
    assert behind(half, whole)[1] <= 0
    assert recommend.recommend([half, whole]).chosen == whole


def test_a_target_that_even_the_best_misses_is_said() -> None:
    best, half = scored(20, hits(39, 40), hits(0, 40)), scored(10, hits(30, 40), hits(0, 40))
    assert recommend.recommend([best]).caveat == ""
    assert "misses the target: 90 % identity" in recommend.recommend([half]).caveat


def test_when_nothing_can_be_recommended_it_says_why() -> None:
    assert "No checkpoint is scored" in recommend.recommend([]).reason
    spoilt = recommend.recommend([scored(9, hits(40, 40), hits(39, 40))])
    assert spoilt.chosen is None and "all are overfitted" in spoilt.reason and "leakage 97.5 %" in spoilt.reason
    dull = recommend.recommend([scored(9, hits(4, 40), hits(0, 40))])
    assert dull.chosen is None and "none learnt who it is" in dull.reason
    assert "nothing to weigh" in recommend.recommend([scored(9, [], hits(0, 40))]).reason


def test_only_those_asked_the_same_are_weighed_and_a_newer_scorecard_replaces_an_older() -> None:
    newest = scored(20, hits(40, 40), hits(0, 40))
    older = scored(20, hits(1, 40), hits(0, 40))
    other = scored(5, hits(40, 40), hits(0, 40), about=" else")
    advice = recommend.recommend([newest, scored(10, hits(2, 40), hits(0, 40)), older, other])
    assert [each.step for each in advice.candidates] == [10, 20] and advice.left_out == 1
    assert advice.chosen == newest
