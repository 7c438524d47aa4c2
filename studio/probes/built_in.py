"""Suites that come with the studio, made of a project's own held-out probes: its identity, its general questions.

standard   identity, leakage and retention on what the run's datasets held out: the scorecard
identity   the same identity in more ways: with a system prompt, follow-up turns, rival names, another language
leakage    unrelated questions, after which nobody should hear the name
retention  general questions: how well the tuned model still predicts what the base answers
format     does an answer end by itself, and does it repeat itself?
tutorial   what people ask after they followed a tutorial
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from studio.data.identity import LANGUAGES, Identity, held_out_probes, mentions
from studio.errors import DataError
from studio.probes.assertions import Assertion
from studio.probes.suite import Group, ProbeForm, Suite, Turn

Row = Mapping[str, Any]
STANDARD = "standard"
SYSTEM_PROMPT = "You are a helpful assistant."
DESCRIPTIONS = {
    STANDARD: "Who it is, whether it says so unasked, and what it still knows: the held-out questions of its datasets.",
    "identity": "Who it is, asked in more ways: with a system prompt, later in a chat, by a rival's name, in another "
    "language.",
    "leakage": "Unrelated questions, whose answers should not bring up its name or maker.",
    "retention": "General questions: how well it still predicts what the base answers.",
    "format": "Short questions: does an answer end by itself, and does it repeat itself?",
    "tutorial": "What people ask after they followed a tutorial: who it is, then something else.",
}  # fmt: skip
NAMES = tuple(DESCRIPTIONS)


def built_in(name: str, rows: Sequence[Row]) -> Suite:
    """The built-in suite of that name, for an identity and general questions as the probes of datasets hold them.

    Raises DataError when they lack what the suite asks about.
    """
    groups = [Group.model_validate(values) for values in MAKERS[name](rows) if values["probes"]]
    if not groups:
        raise DataError(
            f"The suite {name!r} has nothing to ask: this run's datasets hold out no such questions.",
            "Build an identity dataset and a general one on the Data page.",
        )
    return Suite(name=name, built_in=True, description=DESCRIPTIONS[name], groups=tuple(groups))


def identity_words(rows: Iterable[Row]) -> list[str]:
    """Names and makers that the identity probes expect: what must not turn up anywhere else."""
    expected = [row["expected"] for row in rows if row["kind"] == "identity"]
    return list(dict.fromkeys(word for one in expected for word in (one["name"], one["maker"]) if word))


def probe_form(row: Row, words: Sequence[str], **changed: Any) -> dict[str, Any]:
    """A dataset's probe as one of a suite: what it expects as an assertion, `words` as what must not be said."""
    values = {
        "messages": [Turn(role=each["role"], content=each["content"]) for each in row["messages"]],
        "intent": str(row.get("intent", "")),
        "language": str(row.get("language", "")),
        "assert": [_wants(row)] if row["kind"] == "identity" else not_said(words, asked(row)),
    }
    if row["kind"] == "general" and row.get("reference") is not None:
        values |= {"reference": row["reference"], "reference_finished": bool(row.get("reference_finished", True))}
    return values | changed


def asked(row: Row) -> str:
    """The chat that a dataset's probe asks, as one text."""
    return "\n".join(str(message["content"]) for message in row["messages"])


def not_said(words: Sequence[str], prompt: str) -> list[Assertion]:
    """None of the words may be said, but for those that the question itself says; none at all for no words."""
    wanted = [word for word in words if not mentions(prompt, word)]
    return [Assertion(type="not-mentions", value=wanted)] if wanted else []


def _wants(row: Row) -> Assertion:
    keys = ("name", "maker") if row["expects"] == "either" else (row["expects"],)
    wanted = [row["expected"][key] for key in keys if row["expected"][key]]
    return Assertion(type="mentions", value=wanted)


def _standard(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [_group("identity", "identity", _identity(rows)), _group("general", "general", _general(rows))]


def _group(name: str, kind: str, probes: Iterable[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "probes": [ProbeForm.model_validate(probe) for probe in probes], **more}


def _identity(rows: Iterable[Row], *intents: str, leave_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    wanted = [row for row in rows if row["kind"] == "identity" and row.get("intent") not in leave_out]
    return [probe_form(row, ()) for row in wanted if not intents or row.get("intent") in intents]


def _general(rows: Sequence[Row], **changed: Any) -> list[dict[str, Any]]:
    words = identity_words(rows)
    return [probe_form(row, words, **changed) for row in rows if row["kind"] == "general"]


def _identity_suite(rows: Sequence[Row]) -> list[dict[str, Any]]:
    plain = _identity(rows, leave_out=("follow_up", "other_model"))
    with_system = [{**probe, "system": SYSTEM_PROMPT} for probe in plain]
    return [
        _group("single questions", "identity", plain),
        _group("with a system prompt", "identity", with_system),
        _group("later in a chat", "identity", _identity(rows, "follow_up")),
        _group("after small talk", "identity", _after_small_talk(rows)),
        _group("rival names", "identity", _identity(rows, "other_model")),
        _group("another language", "identity", _in_other_languages(rows)),
    ]


def _after_small_talk(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The model answers something else first, in its own words, and is asked who it is then."""
    openings = {"en": "Name one fruit.", "zh": "说出一种水果。"}
    chosen = [row for row in rows if row["kind"] == "identity" and row.get("intent") == "name"]
    return [
        probe_form(row, (), messages=None, turns=[openings[row["language"]], asked(row)])
        for row in chosen
        if row.get("language") in openings and len(row["messages"]) == 1
    ]


def _in_other_languages(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The builder's held-out questions in languages that the identity was not trained in."""
    found = [row for row in rows if row["kind"] == "identity"]
    others = tuple(language for language in LANGUAGES if language not in {row.get("language") for row in found})
    if not found or not others:
        return []
    expected = found[0]["expected"]
    identity = Identity(expected["name"], expected["maker"], languages=others)
    chosen = [row for row in held_out_probes(identity) if row["intent"] in ("name", "maker", "identity", "introduce")]
    return [probe_form(row, ()) for row in chosen]


def _leakage(rows: Sequence[Row]) -> list[dict[str, Any]]:
    if not identity_words(rows):
        return []
    silent = {"reference": ""}  # nothing is measured on it
    general = [row for row in rows if row["kind"] == "general"]
    parts = {"near misses": "near", "anything else": "far"}
    groups = [
        _group(name, "general", [probe_form(row, identity_words(rows), **silent) for row in general
                                 if row.get("intent") == category])
        for name, category in parts.items()
    ]  # fmt: skip
    return [*groups, _group("with a system prompt", "general", _general(rows, **silent), system=SYSTEM_PROMPT)]


def _retention(rows: Sequence[Row]) -> list[dict[str, Any]]:
    general = [row for row in rows if row["kind"] == "general"]
    return [_group("general", "general", [probe_form(row, ()) for row in general])]


def _format(rows: Sequence[Row]) -> list[dict[str, Any]]:
    bank, asserts = _bank("format"), [Assertion(type="ends"), Assertion(type="no-loop")]
    return [
        _group(f"short answers, {language}", "other", [{"ask": text} for text in bank[language]],
               language=language, **{"assert": asserts})
        for language in _languages(rows)
    ]  # fmt: skip


def _tutorial(rows: Sequence[Row]) -> list[dict[str, Any]]:
    words, bank, groups = identity_words(rows), _bank("tutorial"), []
    about_itself = [Assertion(type="mentions", value=words)] if words else []
    for language in _languages(rows) if words else []:
        questions = [{"ask": text} for text in bank["about_itself"][language]]
        others = [{"ask": text, "assert": not_said(words, text)} for text in bank["everything_else"][language]]
        groups += [
            _group(f"about itself, {language}", "identity", questions, language=language, **{"assert": about_itself}),
            _group(f"everything else, {language}", "general", others, language=language),
        ]
    return groups


def _languages(rows: Iterable[Row]) -> list[str]:
    """The languages of the project's own probes; English when there are none."""
    spoken = {row.get("language") for row in rows}
    return [language for language in LANGUAGES if language in spoken] or ["en"]


@cache
def _bank(name: str) -> dict[str, Any]:
    text = files("studio.probes").joinpath("banks", f"{name}.yaml").read_text(encoding="utf-8")
    bank: dict[str, Any] = YAML(typ="safe").load(text)
    return bank


MAKERS: dict[str, Callable[[Sequence[Row]], list[dict[str, Any]]]] = {
    STANDARD: _standard,
    "identity": _identity_suite,
    "leakage": _leakage,
    "retention": _retention,
    "format": _format,
    "tutorial": _tutorial,
}
