"""Which checkpoint to take: the rule holds for whatever was measured, and few questions give no verdict."""

from hypothesis import given, settings
from hypothesis import strategies as st

from studio import recommend
from studio.recommend import Candidate, behind, pareto
from tests.scored import hits, scored


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


@settings(deadline=None, max_examples=25)
@given(checkpoints())
def test_the_recommended_one_is_the_earliest_that_is_not_told_from_the_best(found: list[Candidate]) -> None:
    advice = recommend.recommend(found)
    sound = [each for each in advice.candidates if each.overfit.verdict != "overfitted"]
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


def test_what_the_recommended_one_may_have_lost_is_said_beside_it() -> None:
    advice = recommend.recommend([scored(10, hits(30, 30), hits(4, 30))])
    assert advice.chosen.overfit.verdict == "unclear"
    assert advice.caveat == advice.chosen.overfit.suspicions[0].sentence


@settings(deadline=None, max_examples=25)
@given(checkpoints())
def test_a_run_stands_as_its_last_scored_checkpoint_does(found: list[Candidate]) -> None:
    [run] = recommend.recommend(found).runs
    assert run.last.step == max(each.step for each in found)
    assert run.is_overfitted == (run.last.overfit.verdict == "overfitted") == bool(run.figures)
    assert bool(run.sentence) == any(each.overfit.verdict == "overfitted" for each in run.scored)


def test_a_run_that_leaked_on_its_way_and_ended_well_is_not_overfitted() -> None:
    early, late = scored(10, hits(30, 40), hits(20, 40)), scored(20, hits(39, 40), hits(0, 40))
    [run] = recommend.recommend([late, early]).runs
    assert not run.is_overfitted
    assert run.sentence == "lora-1 was overfitted on its way, at step 10; at the last scored one, 20, it is not."
    [run] = recommend.recommend([early, scored(20, hits(40, 40), hits(39, 40))]).runs
    assert run.sentence == "lora-1 is overfitted at its end, step 20: 2 of 2 scored checkpoints are."
    assert run.figures == [
        "It says who it is in 39 of 40 unrelated answers: 97.5 % (95 %: 87.1 % to 99.6 %); the base in 0."
    ]


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
    assert recommend.recommend([half, whole]).chosen.step == whole.step


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
    assert advice.chosen.evaluation_id == newest.evaluation_id
