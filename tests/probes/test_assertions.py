"""What answers must hold: each kind passes and fails where it should, and none can be made to take long."""

from typing import Any

import pytest
from pydantic import ValidationError

from studio.probes.assertions import KINDS, Assertion, Said, check, numbers_in

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 2}, "age": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "equals", "value": "Paris"}, " Paris\n", "Paris."),
    ({"type": "contains", "value": "Luna"}, "I am Luna.", "I am luna."),
    ({"type": "icontains", "value": "LUNA"}, "I am luna.", "I am Lena."),
    ({"type": "contains-any", "value": ["a", "b"]}, "b", "c"),
    ({"type": "contains-all", "value": ["a", "b"]}, "b a", "b"),
    ({"type": "icontains-any", "value": ["A", "b"]}, "xa", "c"),
    ({"type": "icontains-all", "value": ["A", "b"]}, "Ba", "a"),
    ({"type": "starts-with", "value": "Yes"}, "Yes, I do", "No. Yes"),
    ({"type": "mentions", "value": "Al"}, "我是Al。", "also"),
    ({"type": "mentions", "value": ["Luna", "Shane"]}, "by SHANE", "lunar shanes"),
    ({"type": "regex", "value": r"\b9( am|:00)\b"}, "at 9 am", "at 19 am"),
    ({"type": "is-json"}, '{"a": [1]}', "{'a': 1}"),
    ({"type": "is-json", "value": SCHEMA}, '{"name": "Al", "age": 3.0}', '{"name": "Al", "age": -1}'),
    ({"type": "is-json", "value": SCHEMA}, '{"name": "Al"}', '{"name": "Al", "x": 1}'),
    ({"type": "is-json", "value": {"type": "array", "items": {"enum": [1, 2]}}}, "[1, 2]", "[1, 3]"),
    ({"type": "is-json", "value": {"type": ["integer", "null"]}}, "null", "true"),
    ({"type": "contains-json", "value": SCHEMA}, 'Sure {x} ```{"name": "Al"}```', 'Sure {"name": 1}'),
    ({"type": "number", "value": 4}, "2 + 2 = 4.", "4 is not 5"),
    ({"type": "number", "value": 1234.5, "tolerance": 0.1}, "about 1,234.56", "about 1,235"),
    ({"type": "number", "value": -3, "which": "first"}, "-3 and 4", "4 and -3"),
    ({"type": "number", "value": 7, "which": "any"}, "1, 7, 9", "1, 9"),
    ({"type": "similar", "value": "The sky is blue.", "threshold": 0.7}, "the sky is very blue", "grass is green"),
    ({"type": "no-loop"}, "A plain sentence about nothing.", "and so on " * 12),
    ({"type": "not-contains", "value": "ChatGPT"}, "I am Luna.", "I am ChatGPT."),
]  # fmt: skip


@pytest.mark.parametrize(("values", "good", "bad"), CASES)
def test_each_kind_passes_and_fails(values: dict[str, Any], good: str, bad: str) -> None:
    assertion = Assertion.model_validate(values)
    assert check(assertion, Said(good)).passed is True
    assert check(assertion, Said(bad)).passed is False
    turned = assertion.type.removeprefix("not-") if assertion.negated else f"not-{assertion.type}"
    assert check(Assertion.model_validate(values | {"type": turned}), Said(good)).passed is False


def test_every_kind_has_a_case() -> None:
    assert set(KINDS) == {str(values["type"]).removeprefix("not-") for values, _, _ in CASES} | {"ends", "llm-rubric"}


def test_an_answer_that_was_cut_did_not_end_by_itself() -> None:
    assert check(Assertion(type="ends"), Said("a", True)).passed
    cut = check(Assertion(type="ends"), Said("a", False))
    assert cut.passed is False and cut.why == "was cut at the token limit"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"type": "contians", "value": "a"}, "there are equals, contains"),
        ({"type": "contains"}, "needs a text"),
        ({"type": "contains-any", "value": []}, "needs a list of texts"),
        ({"type": "ends", "value": 3}, "takes no value"),
        ({"type": "number", "value": True}, "needs a number"),
        ({"type": "number", "value": float("nan")}, "needs a number"),
        ({"type": "regex", "value": "(("}, "is no regular expression"),
        ({"type": "regex", "value": "a" * 501}, "501 characters"),
        ({"type": "is-json", "value": {"type": "text"}}, "does not know the JSON type 'text'"),
        ({"type": "is-json", "value": {"pattern": "x"}}, "does not know the schema word 'pattern'"),
        ({"type": "is-json", "value": {"type": [["string"]]}}, "does not know the JSON type"),
        ({"type": "is-json", "value": {"minimum": "5"}}, "needs a number as minimum"),
        ({"type": "is-json", "value": {"enum": 5}}, "needs enum as a list"),
        ({"type": "is-json", "value": {"required": [[1]]}}, "required as a list of names"),
        ({"type": "is-json", "value": {"properties": {"a": None}}}, "needs a JSON schema"),
        ({"type": "similar", "value": "a", "threshold": 2}, "less than or equal to 1"),
        ({"type": "contains", "value": "a", "weight": 2}, "weight"),
    ],
)
def test_what_cannot_be_asked_for_is_said(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told.replace("(", r"\(")):
        Assertion.model_validate(values)


def test_a_pattern_that_explodes_decides_nothing() -> None:
    mark = check(Assertion(type="not-regex", value="(a|aa)+$"), Said("a" * 200 + "b"))
    assert mark.passed is None and "took more than" in mark.why


def test_deep_json_is_no_json() -> None:
    assert check(Assertion(type="is-json"), Said("[" * 15_000)).passed is False
    assert check(Assertion(type="contains-json"), Said("[" * 15_000)).passed is False


def test_numbers_are_read_as_people_write_them() -> None:
    assert numbers_in("−3, 1,234.5 and 2e3; .5") == [-3.0, 1234.5, 2000.0, 0.5]
    assert numbers_in("1,2,3; 12,3456 and 1,000,000, 7") == [1, 2, 3, 12, 3456, 1_000_000, 7]
