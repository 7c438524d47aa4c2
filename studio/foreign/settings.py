"""The few facts of an XTuner config that its weights need: base, adapter, accumulation, template. Parsed, never run.

A checkpoint carries its config as text (`meta.cfg`), and older ones lie beside their `.py`. Only literals, names that
stand for literals, and `dict(...)` are read; what is computed is not, and stays unknown.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from studio.errors import CheckpointError

MAX_CONFIG_BYTES = 4 * 2**20
MAX_DEPTH = 60
UNKNOWN = object()
"""Stands for a value that only running the config would tell."""


@dataclass(frozen=True)
class Settings:
    """What is known; empty or zero where the config does not say it in a way that can be read."""

    base: str = ""
    lora: dict[str, Any] = field(default_factory=dict)
    is_quantized: bool = False
    accumulation: int = 0
    template: str = ""
    max_length: int = 0
    learning_rate: float = 0.0


def read_settings(text: str) -> Settings:
    """Raises CheckpointError for a text that is no Python, or is unreasonably long or deep."""
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"The config has {len(text)} characters.", f"Allowed: {MAX_CONFIG_BYTES}.")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"The config cannot be read: {error}.", "Give the config that XTuner dumped.") from error
    return _settings(_Names(tree).value)


def _settings(look: Callable[[str], Any]) -> Settings:
    model = _dict(look("model"))
    llm, lora = _dict(model.get("llm")), _dict(model.get("lora"))
    optimizer = _dict(look("optim_wrapper"))
    accumulation = _first(int, optimizer.get("accumulative_counts"), look("accumulative_counts"))
    base = _first(str, llm.get("pretrained_model_name_or_path"), look("pretrained_model_name_or_path"))
    quantization = _dict(llm.get("quantization_config"))
    return Settings(
        base=base or "",
        lora={name: value for name, value in lora.items() if value is not UNKNOWN and name != "type"},
        is_quantized=bool(quantization.get("load_in_4bit") or quantization.get("load_in_8bit")),
        accumulation=accumulation or 0,
        template=(_first(str, look("prompt_template")) or "").rpartition(".")[2],
        max_length=_first(int, look("max_length")) or 0,
        learning_rate=_first(float, look("lr")) or 0.0,
    )


class _Names:
    """The values of a config's names. Each name is worked out once, so names of names cost no more than the text."""

    def __init__(self, tree: ast.Module) -> None:
        self._nodes: dict[str, ast.expr] = {}
        self._known: dict[str, Any] = {}
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self._nodes[statement.targets[0].id] = statement.value

    def value(self, name: str, depth: int = 0) -> Any:
        """UNKNOWN when the name would have to be run, goes in a circle, or is not there."""
        if name in self._nodes and name not in self._known:
            self._known[name] = UNKNOWN  # while it is being worked out: a circle ends here
            self._known[name] = self._of(self._nodes[name], depth + 1)
        return self._known.get(name, UNKNOWN)

    def _of(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_DEPTH:
            return UNKNOWN
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.value(node.id, depth)
        if isinstance(node, ast.Attribute):  # PROMPT_TEMPLATE.internlm2_chat: the name itself is the fact
            return node.attr if isinstance(node.value, ast.Name) else UNKNOWN
        if isinstance(node, ast.List | ast.Tuple):
            return [self._of(each, depth + 1) for each in node.elts]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: self._of(each, depth + 1) for key, each in pairs if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            return {each.arg: self._of(each.value, depth + 1) for each in node.keywords if each.arg}
        return UNKNOWN


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(kind: type, *values: Any) -> Any:
    """The first value of that kind; whole numbers count as real ones."""
    kinds = (float, int) if kind is float else (kind,)
    return next((value for value in values if isinstance(value, kinds) and not isinstance(value, bool)), None)
