"""Suites from promptfoo's configs: `prompts` filled with the `vars` of each of `tests`, its `assert`s kept where an
answer alone decides them. What cannot be read is listed, never guessed. Nothing is run, and no other file is opened.

Form: https://www.promptfoo.dev/docs/configuration/reference/ and .../expected-outputs/deterministic/.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from pydantic import ValidationError

from studio.config.yaml import plain_values, read_tree
from studio.errors import ConfigError, DataError, Problem
from studio.paths import slugify
from studio.probes.assertions import Assertion
from studio.probes.reading import checked
from studio.probes.suite import MAX_PROBES, Suite

SLOT = re.compile(r"\{\{\s*([A-Za-z_][\w.]*)\s*\}\}")
OUTSIDE = re.compile(r"file://|exec:|\S+\.(?:py|js|ts|mjs|cjs|txt|json|jsonl|csv|md|j2|ya?ml)(?::\w+)?$")
CODE = re.compile(r"\{%|\{\{")
READ = ("description", "prompts", "tests", "defaultTest")
OURS = ("type", "value", "threshold")
ABOUT_MODELS = ("providers", "targets", "outputPath", "evaluateOptions", "commandLineOptions", "sharing", "tags")
"""Keys that say who is asked and where results go: that is another matter here, and nothing is lost without them."""


@dataclass(frozen=True)
class Imported:
    """The suite that was made, and what was left out of it: (line or 0, what)."""

    suite: Suite
    left_out: tuple[tuple[int, str], ...]


class _Reader:
    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self.left_out: list[tuple[int, str]] = []

    def skip(self, where: Any, key: Any, what: str) -> None:
        try:
            place = where.lc.key(key) if isinstance(where, Mapping) else where.lc.item(key)
            line = place[0] + 1
        except (AttributeError, KeyError, IndexError, TypeError):
            line = 0
        self.left_out.append((line, what))

    def prompts(self) -> list[list[dict[str, str]]]:
        """Each prompt as a chat whose texts may have slots."""
        prompts = self._tree.get("prompts") or []
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return [chat for number, prompt in enumerate(prompts) if (chat := self._prompt(prompts, number, prompt))]

    def _prompt(self, prompts: Any, number: int, prompt: Any) -> list[dict[str, str]]:
        text = prompt.get("raw") if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str) or OUTSIDE.match(text):
            self.skip(prompts, number, "a prompt in another file, or made by a program")
            return []
        chat = _as_chat(text)
        if any(CODE.search(SLOT.sub("", turn["content"])) for turn in chat):
            self.skip(prompts, number, "a prompt with a filter or a block of its template language")
            return []
        return chat

    def tests(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(vars, assertions) of each test, once for each combination of vars with several values."""
        default = self._tree.get("defaultTest") or {}
        if not isinstance(default, Mapping):
            self.skip(self._tree, "defaultTest", "a defaultTest in another file")
            default = {}
        common, common_vars = self._assertions(default), self._vars(default)
        tests = self._tree.get("tests")
        if not isinstance(tests, list):
            self.skip(self._tree, "tests", "tests in another file")
            tests = []
        for number, test in enumerate(tests or [{}]):
            if not isinstance(test, Mapping):
                self.skip(tests, number, "a test in another file")
                continue
            own = self._assertions(test)
            for key in set(test) - {"vars", "assert", "description"}:
                self.skip(test, key, f"{key} of a test")
            for values in islice(_combinations({**common_vars, **self._vars(test)}), MAX_PROBES + 1):
                yield values, [*common, *own]

    def _vars(self, test: Mapping[str, Any]) -> Mapping[str, Any]:
        given = test.get("vars") or {}
        if isinstance(given, Mapping):
            return given
        self.skip(test, "vars", "vars in another file")
        return {}

    def _assertions(self, test: Mapping[str, Any]) -> list[dict[str, Any]]:
        given = test.get("assert") or []
        if not isinstance(given, list):
            self.skip(test, "assert", "assertions in another file")
            return []
        return [row for number, one in enumerate(given) for row in self._assertion(given, number, one)]

    def _assertion(self, given: Any, number: int, one: Any) -> Iterator[dict[str, Any]]:
        kind = str(one.get("type", "")) if isinstance(one, Mapping) else ""
        if kind == "assert-set":
            yield from self._assertions(one)
            return
        values = {key: value for key, value in plain_values(one).items() if key in OURS} if kind else {}
        try:
            yield Assertion.model_validate(values).row() if "{{" not in str(values) else values
        except ValidationError:
            self.skip(given, number, f"the assertion {kind or one!r}")


def read_promptfoo(text: str, name: str) -> Imported:
    """A suite of the YAML of a promptfoo config. Raises ConfigError where it is none or nothing of it can be asked."""
    tree = read_tree(text, name)
    if not isinstance(tree, Mapping) or "prompts" not in tree:
        raise ConfigError([Problem("line 1", "is no config of promptfoo: it has no prompts")], name)
    reader = _Reader(tree)
    for key in [key for key in tree if key not in (*READ, *ABOUT_MODELS)]:
        reader.skip(tree, key, str(key))
    probes = (
        _probe(reader, chat, values, assertions)
        for chat in reader.prompts()
        for values, assertions in reader.tests()
    )  # fmt: skip
    asked = list(islice(filter(None, probes), MAX_PROBES + 1))  # one too many is told; a million is not made first
    left_out = tuple(dict.fromkeys(reader.left_out))
    if not asked:
        told = "; ".join(what for _, what in left_out) or "it has no prompts"
        raise DataError(f"Nothing in {name!r} can be asked: {told}.", "Write a suite of your own on the Compare page.")
    values = {"groups": [{"name": slugify(name), "probes": asked}]}
    description = str(tree.get("description") or "")[:2000]
    return Imported(checked({"description": description} | values, name), left_out)


def _probe(
    reader: _Reader, chat: list[dict[str, str]], values: dict[str, Any], assertions: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """One prompt filled with one test's values; None where it lacks one."""
    names = {found for turn in chat for found in SLOT.findall(turn["content"])}
    if lacking := sorted(names - set(values)):
        reader.left_out.append((0, f"a prompt whose {lacking[0]} no test gives"))
        return None
    turns = [{**turn, "content": _filled(turn["content"], values)} for turn in chat]
    asserts = [{key: _filled_value(value, values) for key, value in one.items()} for one in assertions]
    asked = {"ask": turns[0]["content"]} if len(turns) == 1 and turns[0]["role"] == "user" else {"messages": turns}
    return asked | ({"assert": asserts} if asserts else {})


def _as_chat(text: str) -> list[dict[str, str]]:
    """A prompt that is a chat in JSON, or one question."""
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        turns = None
    if isinstance(turns, list) and turns and all(_is_turn(turn) for turn in turns):
        return [{"role": str(turn.get("role", "user")), "content": turn["content"]} for turn in turns]
    return [{"role": "user", "content": text}]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str)


def _combinations(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A var with a list of values stands for each of them."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    for chosen in product(*lists.values()):
        yield dict(zip(lists, chosen, strict=True))


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return SLOT.sub(lambda slot: str(values.get(slot[1], slot[0])), text)


def _filled_value(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return _filled(value, values)
    return [_filled_value(each, values) for each in value] if isinstance(value, list) else value
