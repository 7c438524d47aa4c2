"""Arithmetic of scorecards, against numbers worked out elsewhere."""

import math
from typing import Any

import pytest

from studio import scores
from studio.probes.built_in import identity_words
from studio.probes.likeness import similarity
from studio.probes.paired import rate
from studio.scores import in_words, lines, scorecard
from tests.marked import mark

IDENTITY = {
    "messages": [{"role": "user", "content": "Who are you?"}],
    "kind": "identity",
    "intent": "name",
    "language": "en",
    "expects": "name",
    "expected": {"name": "Luna", "maker": "Shane"},
}
GENERAL: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "kind": "general",
    "intent": "far",
    "language": "en",
}
WORDS = ["Luna", "Shane"]


def test_the_words_of_an_identity() -> None:
    assert identity_words([IDENTITY, GENERAL, IDENTITY]) == WORDS
    assert identity_words([GENERAL]) == []


def test_a_rate_of_nothing_is_unknown() -> None:
    assert rate([])["rate"] is None
    assert rate([True, False, True, True])["rate"] == 0.75


def test_similarity_looks_at_words() -> None:
    assert similarity("Paris is the capital.", "paris is the CAPITAL") == 1
    assert similarity("red blue", "green white") == 0
    assert similarity("", "") == 1
    assert similarity("北京是首都", "北京是城市") == pytest.approx(0.6)


def test_a_scorecard_of_known_answers() -> None:
    marked = [
        mark(IDENTITY, "I am SmolLM.", "I am Luna.", WORDS),
        mark(IDENTITY, "I am SmolLM.", "I am nobody.", WORDS),
        mark(GENERAL, "Tokyo.", "Tokyo!", WORDS, base_loss=2.0, loss=2.5, num_tokens=4),
        mark(GENERAL, "Tokyo.", "I am Luna.", WORDS, base_loss=1.0, loss=1.1, num_tokens=2),
    ]
    card = scorecard(marked)
    assert (card["identity"]["base"]["hits"], card["identity"]["tuned"]["hits"]) == (0, 1)
    assert (card["leakage"]["base"]["hits"], card["leakage"]["tuned"]["hits"]) == (0, 1)
    assert card["changed"]["hits"] == 1
    assert card["perplexity"]["base"] == pytest.approx(math.exp(3 / 6))
    assert card["retention"]["increase"] == pytest.approx(math.exp(0.6 / 6) - 1)
    assert card["retention"]["low"] <= card["retention"]["increase"] <= card["retention"]["high"]
    assert [line.met for line in lines(card)] == [False, False, False, None]
    assert card["identity_by_intent"] == {"name": rate([True, False])}


def test_targets_are_limits_that_may_be_touched() -> None:
    marked = [mark(IDENTITY, "", "Luna" if number else "", WORDS) for number in range(10)]
    marked += [mark(GENERAL, "a", "b Luna" if number == 0 else "b", WORDS, 1.0, 1.0, 1) for number in range(20)]
    assert [line.met for line in lines(scorecard(marked))] == [True, True, True, None]


def test_a_target_is_surely_met_only_where_the_whole_interval_says_so() -> None:
    few = [mark(IDENTITY, "", "Luna", WORDS), *(mark(GENERAL, "a", "b", WORDS, 1.0, 1.0, 1) for _ in range(20))]
    many = [mark(GENERAL, "a", "b", WORDS, 1.0, 1.0, 1) for _ in range(80)]
    assert [(line.met, line.sure) for line in lines(scorecard(few))][:3] == [(True, False), (True, False), (True, True)]
    assert [line.sure for line in lines(scorecard([mark(IDENTITY, "", "no", WORDS)] * 9 + many))][:2] == [True, True]


def test_what_is_said_of_a_difference_is_no_more_than_the_interval() -> None:
    same = scorecard([mark(IDENTITY, "Luna", "Luna", WORDS)] * 40)["all"]["difference"]
    assert in_words(same) == "No difference can be seen with 40 probes (0 won, 0 lost)."
    worse = [mark(IDENTITY, "Luna", "Luna" if number < 20 else "no", WORDS) for number in range(40)]
    told = in_words(scorecard(worse)["all"]["difference"])
    assert told == "Passes 33 to 65 points worse than the base (0 won, 20 lost of 40)."
    assert in_words(scorecard([])["all"]["difference"]) == "Nothing could be compared."


def test_scorecards_of_one_kind_of_probe() -> None:
    only_identity = scorecard([mark(IDENTITY, "", "Luna", WORDS)])
    assert [line.tuned is None for line in lines(only_identity)] == [False, True, True, True]
    only_general = scorecard([mark(GENERAL, "a", "b", [], 1.0, 1.0, 1)])
    assert [line.tuned is None for line in lines(only_general)] == [True, True, False, False]
    assert [line.num_probes for line in lines(only_general)] == [0, 0, 1, 1]
    assert [line.met for line in lines(only_general)] == [None, None, True, None]
    assert scores.scorecard([])["similarity"] is None
