"""promptfoo's configs become suites; what an answer alone does not decide is listed with its line."""

import json

import pytest

from studio.errors import ConfigError, DataError
from studio.probes.promptfoo import read_promptfoo
from studio.probes.reading import parse_suite, suite_text

CONFIG = """description: our shop
prompts:
  - 'Tell me about {{topic}}.'
  - '[{"role": "system", "content": "Speak {{ language }}."}, {"role": "user", "content": "What is {{topic}}?"}]'
  - file://prompt.txt
  - '{{ topic | upper }}'
providers: [openai:gpt-4.1]
defaultTest:
  vars: {language: English}
  assert:
    - {type: not-icontains, value: as an AI}
tests:
  - description: fruit
    vars: {topic: [apples, pears]}
    assert:
      - {type: icontains, value: '{{topic}}'}
      - {type: llm-rubric, value: is friendly}
      - {type: javascript, value: output.length < 100}
      - type: assert-set
        assert:
          - {type: regex, value: '\\bred\\b'}
    options: {transform: x}
  - vars: {topic: water}
    assert: [{type: is-json}, {type: latency, threshold: 100}]
scenarios: []
"""


def test_prompts_are_filled_with_the_tests() -> None:
    found = read_promptfoo(CONFIG, "shop")
    suite = parse_suite(suite_text(found.suite), "shop")
    asked = [probe.prompt for probe in suite.probes()]
    assert asked == [
        "Tell me about apples.", "Tell me about pears.", "Tell me about water.",
        "Speak English.\nWhat is apples?", "Speak English.\nWhat is pears?", "Speak English.\nWhat is water?",
    ]  # fmt: skip
    assert [assertion.row() for assertion in suite.probes()[0].asserts] == [
        {"type": "not-icontains", "value": "as an AI"},
        {"type": "icontains", "value": "apples"},
        {"type": "llm-rubric", "value": "is friendly"},
        {"type": "regex", "value": r"\bred\b"},
    ]
    assert suite.description == "our shop"


def test_what_cannot_be_read_is_listed_with_its_line() -> None:
    assert sorted(read_promptfoo(CONFIG, "shop").left_out) == [
        (5, "a prompt in another file, or made by a program"),
        (6, "a prompt with a filter or a block of its template language"),
        (18, "the assertion 'javascript'"),
        (22, "options of a test"),
        (24, "the assertion 'latency'"),
        (25, "scenarios"),
    ]


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no prompts"):
        read_promptfoo("tests: []", "x")
    with pytest.raises(DataError, match="in another file"):
        read_promptfoo("prompts: [file://a.txt]\ntests: tests.csv", "x")
    with pytest.raises(DataError, match="whose topic no test gives"):
        read_promptfoo("prompts: ['{{topic}}']\ntests: [{vars: {other: 1}}]", "x")
    assert read_promptfoo("prompts: Hello", "x").suite.probes()[0].prompt == "Hello"


def test_vars_of_another_file_are_left_out_and_told() -> None:
    found = read_promptfoo("prompts: ['{{x}}']\ntests:\n  - vars: file://vars.yaml\n  - vars: {x: Hello}\n", "x")
    assert [probe.prompt for probe in found.suite.probes()] == ["Hello"]
    assert (3, "vars in another file") in found.left_out


def test_combinations_without_end_are_refused() -> None:
    letters = list("abcdefghij")
    config = {"prompts": ["{{a}}"], "tests": [{"vars": {name: letters for name in "abcdefghijkl"}}]}
    with pytest.raises(ConfigError, match="at most 2000"):
        read_promptfoo(json.dumps(config), "x")
