"""Suite files: YAML in, a checked suite out, with the line of every mistake; and back to YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from studio.config.yaml import plain_values, read_text, read_tree, tree_text
from studio.errors import ConfigError, Problem
from studio.paths import atomic_write_text
from studio.probes.assertions import Assertion
from studio.probes.suite import Group, ProbeForm, Suite, Turn

FORMS: dict[str, type[BaseModel]] = {
    "groups": Group, "probes": ProbeForm, "messages": Turn, "assert": Assertion
}  # fmt: skip


def parse_suite(text: str, name: str) -> Suite:
    """The suite of YAML text. Raises ConfigError with every problem and its line."""
    tree = read_tree(text, name)
    if not isinstance(tree, dict):
        raise ConfigError([Problem("line 1", "expected a suite: description, max_new_tokens, groups")], name)
    return checked(plain_values(tree), name, tree)


def checked(values: dict[str, Any], name: str, tree: Any = None) -> Suite:
    """A suite of plain values; `tree` knows their lines. Raises ConfigError."""
    if reserved := [key for key in ("name", "built_in") if key in values]:
        problem = Problem(_place((reserved[0],), tree), "is not part of a suite; its file's name is its name")
        raise ConfigError([problem], name)
    try:
        return Suite.model_validate(values).model_copy(update={"name": name})
    except ValidationError as error:
        raise ConfigError([_problem(item, tree) for item in _causes(error.errors())], name) from None


def load_suite(path: Path) -> Suite:
    """The suite of a file. Raises ConfigError."""
    return parse_suite(read_text(path), path.stem)


def suite_text(suite: Suite) -> str:
    """YAML text that reads back as the same suite."""
    return tree_text(suite.values())


def save_suite(path: Path, text: str) -> Suite:
    """Write the text of a suite when it is one, comments and all. Raises ConfigError."""
    suite = parse_suite(text, path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    return suite


def _causes(items: Sequence[Any]) -> list[Any]:
    """Without those that only follow from others: a list whose members are wrong counts as empty."""
    inner = [item["loc"] for item in items]
    return [
        item
        for item in items
        if item["type"] != "too_short" or not any(len(loc) > len(item["loc"]) and loc[: len(item["loc"])] == item["loc"]
                                                  for loc in inner)
    ]  # fmt: skip


def _problem(item: Any, tree: Any) -> Problem:
    place = _place(item["loc"], tree)
    if item["type"] == "extra_forbidden":
        return Problem(place, f"there is no {item['loc'][-1]!r} here", ", ".join(_allowed(item["loc"])))
    if item["type"] == "missing":
        return Problem(place, f"{item['loc'][-1]} is missing")
    message = item["msg"].removeprefix("Value error, ")
    simple = not isinstance(item["input"], dict | list | tuple | BaseModel)
    return Problem(place, f"{message}, got {str(item['input'])[:100]!r}" if simple else message)


def _allowed(location: Sequence[Any]) -> list[str]:
    parents = [part for part in location[:-1] if isinstance(part, str)]
    form = FORMS[parents[-1]] if parents and parents[-1] in FORMS else Suite
    names = [field.alias or name for name, field in form.model_fields.items() if not field.exclude]
    return names


def _place(location: Sequence[Any], tree: Any) -> str:
    """`line 12, groups.0.probes.3`: of the deepest part of the path that stands in the text."""
    path = ".".join(str(part) for part in location)
    line = _line(location, tree)
    return ", ".join(filter(None, [f"line {line}" if line else "", path])) or "(top)"


def _line(location: Sequence[Any], tree: Any) -> int:
    line = tree.lc.line + 1 if hasattr(tree, "lc") else 0
    for part in location:
        try:
            line = (tree.lc.key(part) if isinstance(tree, dict) else tree.lc.item(part))[0] + 1
            tree = tree[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line
