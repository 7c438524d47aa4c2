"""What an answer must hold: assertions in promptfoo's form (type, value), and whether an answer passes them.

Every kind but `llm-rubric`, which needs a judge, is decided by arithmetic on the text; `not-` before a kind turns it
round. All are bounded: patterns by length and time, JSON by size and depth, similarity by words.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, model_validator

from studio.config.schema import Section
from studio.data.identity import mentions
from studio.probes.likeness import loops, similarity

LONGEST_ANSWER = 20_000  # characters that are looked at
LONGEST_PATTERN = 500
REGEX_SECONDS = 0.5
DEFAULT_SIMILARITY = 0.75
NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+")
SCHEMA_WORDS = (
    "type", "properties", "required", "items", "enum", "const", "minimum", "maximum", "minLength", "maxLength",
    "minItems", "maxItems", "additionalProperties", "description", "title",
)  # fmt: skip
MEASURES = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
MAX_SCHEMA_DEPTH = 12


@dataclass(frozen=True)
class Said:
    """An answer; `finished` is False when it was cut at the token limit."""

    text: str
    finished: bool = True


@dataclass(frozen=True)
class Mark:
    """One assertion held against one answer; `passed` is None where it could not be decided, `why` says what was
    found."""

    type: str
    passed: bool | None
    why: str = ""


class Assertion(Section):
    """One thing that an answer must hold. Which `value` a type wants: see KINDS."""

    type: str
    value: Any = None
    threshold: Annotated[float, Field(ge=0, le=1)] = DEFAULT_SIMILARITY
    """similar: the least likeness that passes."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """number: how far off it may be."""
    which: Literal["last", "first", "any"] = "last"
    """number: which number of the answer is meant."""

    @property
    def kind(self) -> str:
        return self.type.removeprefix("not-")

    @property
    def negated(self) -> bool:
        return self.type.startswith("not-")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Assertion":
        known = ", ".join(KINDS)
        if self.kind not in KINDS:
            raise ValueError(f"type: there is no assertion {self.type!r}; there are {known}, not- before any")
        if problem := KINDS[self.kind].problem(self.value):
            raise ValueError(f"value: {self.type} {problem}, got {_short(self.value)}")
        return self

    def row(self) -> dict[str, Any]:
        """As plain values, without what is left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True)
class Kind:
    """How one kind of assertion is checked: `problem` with its value ("" for none), `check` an answer."""

    problem: Callable[[Any], str]
    check: Callable[[Assertion, Said], Mark | bool]


def check(assertion: Assertion, said: Said) -> Mark:
    """Hold an assertion against an answer."""
    answer = Said(said.text[:LONGEST_ANSWER], said.finished)
    found = KINDS[assertion.kind].check(assertion, answer)
    return turned(assertion, found if isinstance(found, Mark) else Mark(assertion.type, found))


def turned(assertion: Assertion, mark: Mark) -> Mark:
    """The mark of what an assertion looks for as that of the assertion: turned round where it says not-."""
    passed = mark.passed if mark.passed is None or not assertion.negated else not mark.passed
    return Mark(assertion.type, passed, mark.why or shown_value(assertion))


def shown_value(assertion: Assertion) -> str:
    """What an assertion asks for, short enough for a table cell."""
    if assertion.value is None:
        return ""
    return ", ".join(map(str, assertion.value)) if isinstance(assertion.value, list) else _short(assertion.value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "needs a text"


def _texts(value: Any) -> str:
    is_list = isinstance(value, list) and value and not any(_text(each) for each in value)
    return "" if is_list else "needs a list of texts"


def _text_or_texts(value: Any) -> str:
    return "" if not _text(value) or not _texts(value) else "needs a text, or a list of texts"


def _nothing(value: Any) -> str:
    return "" if value is None else "takes no value"


def _number(value: Any) -> str:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return "" if good else "needs a number"


def _pattern(value: Any) -> str:
    if _text(value):
        return "needs a regular expression"
    if len(value) > LONGEST_PATTERN:
        return f"has {len(value)} characters, of at most {LONGEST_PATTERN}"
    try:
        regex.compile(value)
    except regex.error as error:
        return f"is no regular expression ({error})"
    return ""


def _schema(value: Any) -> str:
    """What is wrong with a JSON schema of the words that are known here; None asks for any JSON."""
    return "" if value is None else _schema_problem(value, 0)


def _schema_problem(value: Any, depth: int) -> str:
    if not isinstance(value, dict) or depth > MAX_SCHEMA_DEPTH:
        return "needs a JSON schema: an object, not nested deeply"
    if unknown := [word for word in value if word not in SCHEMA_WORDS]:
        return f"does not know the schema word {unknown[0]!r}; it knows {', '.join(SCHEMA_WORDS)}"
    if problem := _words_problem(value):
        return problem
    parts = [*value.get("properties", {}).values(), *([value["items"]] if "items" in value else [])]
    return next((problem for part in parts if (problem := _schema_problem(part, depth + 1))), "")


def _words_problem(schema: dict[str, Any]) -> str:
    """Whether each word of a schema has the kind of value it needs: `misfit` relies on it."""
    names = schema.get("type", [])
    if odd := [name for name in (names if isinstance(names, list) else [names]) if name not in list(JSON_TYPES)]:
        return f"does not know the JSON type {odd[0]!r}; there are {', '.join(JSON_TYPES)}"
    required = schema.get("required", [])
    if not isinstance(schema.get("properties", {}), dict) or not (required == [] or not _texts(required)):
        return "needs properties by name and required as a list of names"
    if not isinstance(schema.get("enum", []), list):
        return "needs enum as a list"
    odd = [word for word in MEASURES if word in schema and _number(schema[word])]
    return f"needs a number as {odd[0]}" if odd else ""


def _equals(assertion: Assertion, said: Said) -> bool:
    return said.text.strip() == str(assertion.value).strip()


def _contains(assertion: Assertion, said: Said) -> bool:
    return assertion.value in said.text


def _icontains(assertion: Assertion, said: Said) -> bool:
    return assertion.value.casefold() in said.text.casefold()


def _of(each: Callable[[str, str], bool], combine: Callable[[list[bool]], bool]) -> Callable[[Assertion, Said], bool]:
    return lambda assertion, said: combine([each(value, said.text) for value in assertion.value])


def _in(value: str, text: str) -> bool:
    return value in text


def _in_any_case(value: str, text: str) -> bool:
    return value.casefold() in text.casefold()


def _starts_with(assertion: Assertion, said: Said) -> bool:
    return said.text.lstrip().startswith(assertion.value)


def _mentions(assertion: Assertion, said: Said) -> Mark:
    words = assertion.value if isinstance(assertion.value, list) else [assertion.value]
    found = [word for word in words if mentions(said.text, word)]
    return Mark(assertion.type, bool(found), ", ".join(found))


def _regex(assertion: Assertion, said: Said) -> Mark:
    """A pattern that takes too long on an answer decides nothing."""
    try:
        found = regex.search(assertion.value, said.text, timeout=REGEX_SECONDS)
    except TimeoutError:
        return Mark(assertion.type, None, f"the pattern took more than {REGEX_SECONDS} s on this answer")
    return Mark(assertion.type, found is not None, found[0][:80] if found else "")


def _is_json(assertion: Assertion, said: Said) -> Mark:
    try:
        value = json.loads(said.text)
    except (ValueError, RecursionError) as error:
        return Mark(assertion.type, False, f"is not JSON: {str(error)[:80]}")
    problem = misfit(value, assertion.value or {})
    return Mark(assertion.type, not problem, problem)


def _contains_json(assertion: Assertion, said: Said) -> Mark:
    """The first object or list in the answer that fits."""
    problem = "holds no JSON object or list"
    for place in [match.start() for match in re.finditer(r"[{\[]", said.text)][:50]:
        try:
            value, _ = json.JSONDecoder().raw_decode(said.text, place)
        except (ValueError, RecursionError):
            continue
        if not (problem := misfit(value, assertion.value or {})):
            return Mark(assertion.type, True)
    return Mark(assertion.type, False, problem)


def misfit(value: Any, schema: dict[str, Any], where: str = "$") -> str:
    """Why a value does not fit a JSON schema of SCHEMA_WORDS, "" when it does."""
    names = schema.get("type", list(JSON_TYPES))
    if not any(_is_of(value, name) for name in (names if isinstance(names, list) else [names])):
        return f"{where} is not {names}"
    if "const" in schema and value != schema["const"]:
        return f"{where} is not {_short(schema['const'])}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is not one of {_short(schema['enum'])}"
    return _outside(value, schema, where) or _inner_misfit(value, schema, where)


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, JSON_TYPES[name])


def _outside(value: Any, schema: dict[str, Any], where: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    measures = [
        (value if is_number else None, "minimum", "maximum"),
        (len(value) if isinstance(value, str) else None, "minLength", "maxLength"),
        (len(value) if isinstance(value, list) else None, "minItems", "maxItems"),
    ]
    for measure, low, high in measures:
        if measure is not None and not schema.get(low, -math.inf) <= measure <= schema.get(high, math.inf):
            return f"{where} is outside {low} and {high}"
    return ""


def _inner_misfit(value: Any, schema: dict[str, Any], where: str) -> str:
    if isinstance(value, list) and "items" in schema:
        found = (misfit(each, schema["items"], f"{where}[{i}]") for i, each in enumerate(value))
        return next(filter(None, found), "")
    if not isinstance(value, dict):
        return ""
    properties = schema.get("properties", {})
    if lacking := [name for name in schema.get("required", []) if name not in value]:
        return f"{where} has no {lacking[0]!r}"
    if schema.get("additionalProperties") is False and (strange := set(value) - set(properties)):
        return f"{where} has {sorted(strange)[0]!r}, which is not allowed"
    found = (misfit(value[name], part, f"{where}.{name}") for name, part in properties.items() if name in value)
    return next(filter(None, found), "")


def numbers_in(text: str) -> list[float]:
    """The numbers of a text in their order; 1,234.5 counts as one, 1,2 as two."""
    return [float(match.replace(",", "").replace("−", "-")) for match in NUMBER.findall(text)]


def _is_number(assertion: Assertion, said: Said) -> Mark:
    found = numbers_in(said.text)
    if not found:
        return Mark(assertion.type, False, "holds no number")
    meant = {"last": found[-1:], "first": found[:1], "any": found}[assertion.which]
    near = [each for each in meant if math.isclose(each, assertion.value, rel_tol=1e-9, abs_tol=assertion.tolerance)]
    return Mark(assertion.type, bool(near), f"{(near or meant)[0]:g}")


def _similar(assertion: Assertion, said: Said) -> Mark:
    likeness = similarity(said.text, assertion.value)
    return Mark(assertion.type, likeness >= assertion.threshold, f"{likeness:.2f} alike")


def _ends(assertion: Assertion, said: Said) -> Mark:
    return Mark(assertion.type, said.finished, "" if said.finished else "was cut at the token limit")


def _no_loop(assertion: Assertion, said: Said) -> Mark:
    looped = loops(said.text)
    return Mark(assertion.type, not looped, "repeats itself" if looped else "")


def _needs_a_judge(assertion: Assertion, _said: Said) -> Mark:
    return Mark(assertion.type, None, "no judge is configured")


KINDS = {
    "equals": Kind(_text, _equals),
    "contains": Kind(_text, _contains),
    "icontains": Kind(_text, _icontains),
    "contains-any": Kind(_texts, _of(_in, any)),
    "contains-all": Kind(_texts, _of(_in, all)),
    "icontains-any": Kind(_texts, _of(_in_any_case, any)),
    "icontains-all": Kind(_texts, _of(_in_any_case, all)),
    "starts-with": Kind(_text, _starts_with),
    "mentions": Kind(_text_or_texts, _mentions),
    "regex": Kind(_pattern, _regex),
    "is-json": Kind(_schema, _is_json),
    "contains-json": Kind(_schema, _contains_json),
    "number": Kind(_number, _is_number),
    "similar": Kind(_text, _similar),
    "ends": Kind(_nothing, _ends),
    "no-loop": Kind(_nothing, _no_loop),
    "llm-rubric": Kind(_text, _needs_a_judge),
}
