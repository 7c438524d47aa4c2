"""A base model that is not in the table: its family, read from its config.json."""

import json
from pathlib import Path
from typing import Any

from studio.config.catalog.base_models import BY_ID, KnownModel
from studio.errors import ConfigError, Problem
from studio.models import resolve

# model_type of config.json -> the prompt template of chat models of that kind; others are written as their tokenizer
# says, which is right wherever it has a chat template
TEMPLATES = {
    "baichuan": "baichuan2_chat", "chatglm": "chatglm3", "internlm": "internlm_chat", "internlm2": "internlm2_chat",
    "minicpm": "minicpm", "deepseek_v2": "deepseek_v2", "qwen": "qwen_chat",
}  # fmt: skip


def family_of(base: str) -> tuple[str, KnownModel | None]:
    """(prompt template, model of the table or None) for a base model by id or folder.

    A model that is not here yet, and not in the table, is written as its tokenizer says. Raises ConfigError for a
    config.json that is none, and ModelError for what names no model.
    """
    model = resolve(base)
    if model.id in BY_ID:
        return BY_ID[model.id].template, BY_ID[model.id]
    path = model.folder / "config.json"
    if not path.is_file():
        return "", None
    values = _read(path)
    return TEMPLATES.get(str(values.get("model_type")), ""), None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("model.base", f"{path} cannot be read: {error}")], "catalog") from None
    if not isinstance(values, dict):
        raise ConfigError([Problem("model.base", f"{path} holds no settings")], "catalog")
    return values
