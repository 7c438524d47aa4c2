"""The general prompts: enough of them, halved for good, and never about the assistant."""

from collections import Counter

import pytest

from studio.data.general import CATEGORIES, general_prompts
from studio.data.identity import Identity, build
from studio.data.phrasings import load_bank, normalise
from studio.errors import DataError

LEAST = {"en": 200, "zh": 120}


@pytest.mark.parametrize("language", LEAST)
def test_enough_prompts_and_a_third_of_them_near(language: str) -> None:
    prompts = general_prompts([language])
    counts = Counter(prompt.category for prompt in prompts.train + prompts.held_out)
    assert counts.total() >= LEAST[language]
    assert 0.28 <= counts["near"] / counts.total() <= 0.4


def test_halves_are_equal_in_every_language_and_category() -> None:
    prompts = general_prompts()
    halves = (prompts.train, prompts.held_out)
    train, held_out = (Counter((p.language, p.category) for p in half) for half in halves)
    assert set(train) == {(language, category) for language in LEAST for category in CATEGORIES}
    assert all(abs(train[cell] - held_out[cell]) <= 1 for cell in train)


def test_no_prompt_is_there_twice_even_in_other_words_of_courtesy() -> None:
    prompts = general_prompts()
    assert max(Counter(normalise(p.text) for p in prompts.train + prompts.held_out).values()) == 1


def test_the_split_of_one_language_is_the_same_beside_another() -> None:
    both, english = general_prompts(["zh", "en"]), general_prompts(["en"])
    assert [p for p in both.held_out if p.language == "en"] == english.held_out
    assert general_prompts(["en"]) == english


def test_no_general_prompt_is_a_turn_of_the_identity_data() -> None:
    identity = Identity("Luna", "Shane", "Aurora Lab", languages=("en", "zh"))
    built = build(identity, 4000, 0)
    turns = {normalise(message.content) for row in built.rows for message in row.messages}
    turns |= {normalise(message["content"]) for probe in built.probes for message in probe["messages"]}
    prompts = general_prompts()
    assert not turns & {normalise(p.text) for p in prompts.train + prompts.held_out}


def test_no_prompt_names_another_assistant() -> None:
    banks = [load_bank(f"identity_{language}") for language in LEAST]
    rivals = {rival.casefold() for bank in banks for rival, _ in bank["rivals"]}
    prompts = general_prompts()
    assert not [p for p in prompts.train + prompts.held_out if any(r in p.text.casefold() for r in rivals)]


@pytest.mark.parametrize("languages", [[], ["fr"], ["en", "fr"]])
def test_unknown_languages_are_refused(languages: list[str]) -> None:
    with pytest.raises(DataError, match="Choose en, zh or both"):
        general_prompts(languages)
