"""Votes are counted by pair, and no preference is claimed that the interval does not hold."""

import pytest

from studio.probes.paired import wilson
from studio.store.chats import Vote
from studio.votes import tally


def votes(*choices: str, models=("base", "tuned")) -> list[Vote]:
    """Names are wins; both_good and both_bad are themselves."""
    cast = [("better", each) if each in models else (each, "") for each in choices]
    return [Vote(str(number), "c", choice, model, list(models)) for number, (choice, model) in enumerate(cast)]


def test_the_interval_decides_whether_there_is_a_preference() -> None:
    [pair] = tally(votes(*["tuned"] * 9, "base", "both_good", "both_bad", "both_bad"))
    assert (pair.first, pair.first_wins, pair.second_wins, pair.both_good, pair.both_bad) == ("tuned", 9, 1, 1, 2)
    assert pair.interval == wilson(9, 10) and pair.preferred == "first"
    [pair] = tally(votes(*["tuned"] * 6, *["base"] * 4))
    assert pair.first == "tuned" and pair.preferred == ""


@pytest.mark.parametrize("wins, losses, preferred", [(9, 2, ""), (10, 2, "first")])
def test_a_tally_that_a_fair_coin_makes_too_often_tells_no_preference(wins: int, losses: int, preferred: str) -> None:
    """Wilson's interval of nine in eleven lies above one half; a coin falls as unevenly in 6.5 % of such tallies."""
    [pair] = tally(votes(*["tuned"] * wins, *["base"] * losses))
    assert pair.interval[0] > 0.5 and pair.preferred == preferred


@pytest.mark.parametrize("wins, preferred", [(3, ""), (5, ""), (6, "first")])
def test_few_votes_say_little(wins: int, preferred: str) -> None:
    [pair] = tally(votes(*["tuned"] * wins))
    assert pair.preferred == preferred


def test_no_decided_vote_leaves_everything_open() -> None:
    [pair] = tally(votes("both_good", "both_bad"))
    assert pair.decided == 0 and pair.interval == (0.0, 1.0) and pair.preferred == ""
    assert tally([]) == []


def test_of_several_columns_the_better_one_beats_each_other_one() -> None:
    pairs = tally(votes("a", "a", "b", models=("a", "b", "c")))
    won = {(pair.first, pair.second): (pair.first_wins, pair.second_wins) for pair in pairs}
    assert won == {("a", "b"): (2, 1), ("a", "c"): (2, 0), ("b", "c"): (1, 0)}
