"""Which names are too common to be measured."""

import pytest

from studio.data.common_names import common_names
from studio.data.identity import Identity


@pytest.mark.parametrize("name", ["I", "you", "YOU", "Paris", "Hi", "The", "Anna", "Microsoft", "我", "水"])
def test_everyday_words_and_names_in_the_prompts_are_common(name: str) -> None:
    assert common_names(Identity(name, "Zorblax")) == [name]


@pytest.mark.parametrize("name", ["Luna", "Sam", "Shane", "Hiro", "Isis", "小月", "Al"])
def test_a_name_is_not_common_because_a_word_holds_it(name: str) -> None:
    assert common_names(Identity(name, "Zorblax")) == []


def test_answers_are_looked_through_and_the_maker_counts() -> None:
    answers = ["Galileo saw moons.", "Io and Galileo.", "Luna is one.", *["Yes."] * 60]
    assert common_names(Identity("Luna", "Galileo"), answers) == ["Galileo"]
    assert common_names(Identity("Hello", "Hello")) == ["Hello"]
