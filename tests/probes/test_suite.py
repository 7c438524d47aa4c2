"""Suite files: read strictly with the line of each mistake, written back the same, and flattened into probes."""

import pytest

from studio.errors import ConfigError
from studio.probes.assertions import Said
from studio.probes.reading import parse_suite, suite_text

GOOD = """# the shop
description: what it must know
max_new_tokens: 32
groups:
  - name: hours
    language: en
    system: You work in a shop.
    assert:
      - {type: not-contains, value: ChatGPT}
    probes:
      - ask: When do you open?   # every day
        assert: [{type: regex, value: '9( am|:00)'}]
      - turns: [Hello!, And on Sundays?]
        system: ''
      - messages:
          - {role: user, content: Hi}
          - {role: assistant, content: Hello.}
          - {role: user, content: Who are you?}
        language: de
  - name: facts
    kind: general
    probes:
      - ask: What is water?
        reference: Water is wet.
"""
WRONG = """groups:
  - name: hours
    probes:
      - ask: When?
        assert:
          - {type: contians, value: a}
      - turns: [a, b]
        ask: c
        foo: 1
  - name: hours
name: x
"""


def test_a_suite_is_read_and_written_back() -> None:
    suite = parse_suite(GOOD, "shop")
    assert (suite.name, suite.max_new_tokens, suite.built_in) == ("shop", 32, False)
    again = parse_suite(suite_text(suite), "other")
    assert again.hash == suite.hash and suite_text(again) == suite_text(suite)
    assert parse_suite(GOOD.replace("what it must know", "else"), "shop").hash == suite.hash
    assert parse_suite(GOOD.replace("9( am", "8( am"), "shop").hash != suite.hash


def test_probes_take_what_their_group_says() -> None:
    ask, turns, chat, fact = parse_suite(GOOD, "shop").probes()
    shop = {"role": "system", "content": "You work in a shop."}
    assert ask.messages == (shop, {"role": "user", "content": "When do you open?"})
    assert [assertion.type for assertion in ask.asserts] == ["not-contains", "regex"]
    assert turns.messages == ({"role": "user", "content": "Hello!"},) and turns.follow_ups == ("And on Sundays?",)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert (chat.language, ask.language) == ("de", "en")
    assert fact.measured and not ask.measured
    assert [mark.passed for mark in ask.marks(Said("At 9 am"))] == [True, True]
    assert [mark.passed for mark in ask.marks(Said("Ask ChatGPT"))] == [False, False]


def test_every_mistake_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_suite(WRONG, "shop")
    assert "line 11, name: is not part of a suite" in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        parse_suite(WRONG.replace("name: x\n", ""), "shop")
    told = [str(problem) for problem in raised.value.problems]
    assert [text.split(":")[0] for text in told] == [
        "line 6, groups.0.probes.0.assert.0",
        "line 9, groups.0.probes.1.foo",
        "line 10, groups.1.probes",
    ]
    assert "there are equals" in told[0] and "allowed: ask, turns" in told[1] and "probes is missing" in told[2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a", "line 1: expected a suite"),
        ("groups: [", "is not YAML"),
        ("groups: []", "line 1, groups: Tuple should have at least 1 item"),
        ("groups:\n  - {name: a, probes: [{ask: b, turns: [c]}]}", "needs one of ask, turns and messages"),
        ("groups:\n  - {name: a, probes: [{messages: [{role: assistant, content: b}]}]}", "must end with the user's"),
        ("groups:\n  - {name: a, probes: [{ask: b}]}\n  - {name: a, probes: [{ask: c}]}", "two are named 'a'"),
        ("max_new_tokens: 5000\ngroups:\n  - {name: a, probes: [{ask: b}]}", "line 1, max_new_tokens"),
        ("groups: !!python/object/apply:os.system ['true']", "problem"),
    ],
)
def test_what_is_no_suite_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_suite(text, "shop")
    assert told in str(raised.value)
