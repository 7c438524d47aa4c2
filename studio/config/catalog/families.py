"""A base model that is not in the table: its family, read from its config.json."""

import json
from pathlib import Path
from typing import Any

from studio.config.catalog.base_models import BY_ID, KnownModel
from studio.data.named import NamedTemplate, template_names
from studio.data.template import ChatTemplate
from studio.errors import ConfigError, DataError, ModelError, Problem
from studio.models import MODELSCOPE_PREFIX, resolve

# model_type of config.json -> the prompt template of chat models of that kind; others are written as their tokenizer
# says, which is right wherever it has a chat template
TEMPLATES = {
    "baichuan": "baichuan2_chat", "chatglm": "chatglm3", "internlm": "internlm_chat", "internlm2": "internlm2_chat",
    "minicpm": "minicpm", "deepseek_v2": "deepseek_v2", "qwen": "qwen_chat",
}  # fmt: skip
CHAT = [
    {"role": role, "content": f"a text of the {role}"} for role in ("system", "user", "assistant", "user", "assistant")
]


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


def known_model_type(base: str) -> str:
    """model_type of a base of the table, or of one that is here; "" where neither says it."""
    if known := BY_ID.get(base.removeprefix(MODELSCOPE_PREFIX)):
        return known.shape.model_type
    folder = _folder(base)
    return str(_read(folder / "config.json").get("model_type", "")) if folder else ""


def named_like(base: str) -> str:
    """The first of the named templates that writes a chat with a system message as the tokenizer of a base does; ""
    where none does, or the base is not here."""
    folder = _folder(base)
    if folder is None:
        return ""
    try:
        wanted = ChatTemplate.load(folder).render(CHAT)
    except DataError:
        return ""
    return next((name for name in template_names() if _render(name, folder) == wanted), "")


def _folder(base: str) -> Path | None:
    """The folder of a base that is here."""
    try:
        folder = resolve(base).folder
    except ModelError:
        return None
    return folder if (folder / "config.json").is_file() else None


def _render(name: str, folder: Path) -> str:
    try:
        return NamedTemplate.load(name, folder).render(CHAT)
    except DataError:  # it has no place for a system message
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("model.base", f"{path} cannot be read: {error}")], "catalog") from None
    if not isinstance(values, dict):
        raise ConfigError([Problem("model.base", f"{path} holds no settings")], "catalog")
    return values
