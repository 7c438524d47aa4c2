"""Configs as YAML 1.2 that keeps a person's comments; ruamel's round-trip loader runs no code for tags."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from studio.config.files import read_config
from studio.config.schema import RunConfig, parse_config
from studio.errors import ConfigError, Problem
from studio.paths import atomic_write_text

MAX_YAML_BYTES = 1_000_000
MAX_DEPTH = 20


def load_text(text: str, source: str = "config") -> RunConfig:
    """Parse and check YAML text. Raises ConfigError with every problem."""
    return parse_config(plain_values(read_tree(text, source)), source)


def load_config(path: Path) -> RunConfig:
    """Read and check a config file. Raises ConfigError."""
    return load_text(read_text(path), path.name)


def read_text(path: Path) -> str:
    """The text of a config file. Raises ConfigError when it cannot be read."""
    return read_config(path, MAX_YAML_BYTES)


def save_config(path: Path, config: RunConfig) -> None:
    """Write a config; comments of the file that it replaces are kept."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    atomic_write_text(path, update_text(before, config))


def update_text(text: str, config: RunConfig) -> str:
    """YAML text of `config`, keeping comments and order of `text` where the keys are still there."""
    tree = read_tree(text, "config") if text.strip() else None
    values = _quoted(config.model_dump(mode="json"))
    if isinstance(tree, dict):
        _merge(tree, values)
    else:
        tree = values
    return tree_text(tree)


def tree_text(tree: Any) -> str:
    """YAML text of a tree or of plain values."""
    out = io.StringIO()
    _yaml().dump(tree, out)
    return out.getvalue()


def commented_text(values: dict[str, Any], remarks: Mapping[str, str], header: Sequence[str]) -> str:
    """YAML text of plain values, with `header` as comment lines on top and remarks behind the values at their paths
    (`train.learning_rate`)."""
    tree = _commented(_quoted(values), remarks, "")
    return "".join(f"# {line}\n" if line else "#\n" for line in header) + tree_text(tree)


def _commented(values: dict[str, Any], remarks: Mapping[str, str], prefix: str) -> CommentedMap:
    tree = CommentedMap()
    for key, value in values.items():
        tree[key] = _commented(value, remarks, f"{prefix}{key}.") if isinstance(value, dict) and value else value
        if remark := " ".join(remarks.get(f"{prefix}{key}", "").split()):
            tree.yaml_add_eol_comment(f"# {remark}", key, column=0)
    return tree


def with_settings(config: RunConfig, settings: list[str]) -> RunConfig:
    """`config` with `train.learning_rate=1e-4`-like settings applied. Raises ConfigError."""
    values = config.model_dump(mode="json")
    problems = [problem for setting in settings if (problem := _apply(values, setting))]
    try:
        changed = parse_config(values, "--set")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], "--set") from None
    if problems:
        raise ConfigError(problems, "--set")
    return changed


def _apply(values: dict[str, Any], setting: str) -> Problem | None:
    path, equals, text = setting.partition("=")
    if not equals:
        return Problem(setting, "expected key=value, for example train.num_steps=40")
    *parents, key = path.strip().split(".")
    target = values
    for parent in parents:
        if not isinstance(target.get(parent), dict):
            return Problem(path, "is not a setting", ", ".join(target))
        target = target[parent]
    target[key] = plain_values(read_tree(text, path))
    return None


def _quoted(value: Any) -> Any:
    """The same with texts that hold a next-line sign (U+0085) in double quotes, where the writer escapes it; elsewhere
    it writes the sign as it is, and a reader takes it for a line break."""
    if isinstance(value, dict):
        return {key: _quoted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_quoted(each) for each in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and "\x85" in value else value


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def read_tree(text: str, source: str) -> Any:
    """ruamel's tree of YAML text, which knows the line of each value (`.lc`). Raises ConfigError."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError([Problem("(file)", f"is {len(text)} characters long", f"<= {MAX_YAML_BYTES}")], source)
    try:
        _require_plain(text, source)
        return _yaml().load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([Problem("(file)", f"is not YAML: {' '.join(str(error).split())[:300]}")], source) from None


def _require_plain(text: str, source: str) -> None:
    """Look through the text before anything is built of it; no config is deep, nor repeats itself by aliases: a few
    lines of aliases of aliases stand for more values than memory holds. Raises ConfigError."""
    depth = 0
    for event in _yaml().parse(text):
        if isinstance(event, AliasEvent):
            raise ConfigError(
                [Problem("(file)", f"repeats a part by the alias *{event.anchor}", "write it out")], source
            )
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError([Problem("(file)", "is nested too deeply", f"<= {MAX_DEPTH} levels")], source)


def plain_values(node: Any) -> Any:
    """ruamel's containers and scalars as ordinary ones."""
    if isinstance(node, dict):
        return {str(key): plain_values(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain_values(value) for value in node]
    if isinstance(node, bool):
        return bool(node)
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _merge(tree: Any, values: dict[str, Any]) -> None:
    for key in [key for key in tree if key not in values]:
        del tree[key]
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        elif plain_values(tree.get(key)) != value or key not in tree:
            tree[key] = value
