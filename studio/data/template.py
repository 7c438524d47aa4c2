"""A model's chat template: messages in, the text that is trained out, and which parts the loss counts."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from studio.data.conversation import Conversation
from studio.data.draft import GENERATION_MARKS, Draft
from studio.data.phrasings import load_bank
from studio.data.render_worker import WORKER, Chat
from studio.data.segments import ChatMessage, Segment, as_turns, require_loss_on
from studio.errors import DataError

CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source and the special tokens it may name (`bos_token`, `eos_token`, …)."""

    source: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, model_folder: Path) -> "ChatTemplate":
        """The template of a model folder; DataError when it has none."""
        folder = Path(model_folder)
        source = _template_source(folder)
        if source is None:
            raise DataError(
                f"The model {folder.name!r} has no chat template; base models come without one.",
                "Choose a named template instead (data.template), for example qwen_chat.",
            )
        return cls(source, special_tokens(folder))

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that shapes the text and what of it is trained."""
        content = json.dumps([self.source, sorted(self.special_tokens.items()), _trained_around(self.source)])
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
        """The text of a chat, the same as transformers' `apply_chat_template(tokenize=False)`."""
        turns = as_turns(messages)
        [texts] = WORKER.render(self.source, self._variables, [(turns, [(len(turns), add_generation_prompt)], None)])
        if isinstance(texts, DataError):
            raise texts
        return GENERATION_MARKS.sub("", texts[0])

    def segments(
        self,
        messages: Sequence[ChatMessage],
        loss_on: str = "assistant",
        control_tokens: Collection[str] = (),
    ) -> list[Segment]:
        """Split the rendered text into trained and untrained pieces; joined they are `render(messages)`.

        loss_on: "assistant" trains every answer, "last" the last one, "all" the whole text. A message's own
        `trained` overrides. An answer's piece is its text and the token that ends the turn, without the white
        space after that. `control_tokens` found inside messages become literal pieces. Raises DataError when
        the template fails or answers cannot be told from the rest.
        """
        [found] = self._segments_of([messages], loss_on, control_tokens, [None])
        if isinstance(found, DataError):
            raise found
        return found

    def segments_of(
        self,
        conversations: Sequence[Conversation],
        loss_on: str = "assistant",
        control_tokens: Collection[str] = (),
    ) -> list[list[Segment] | DataError]:
        """As `segments` for many conversations at once, which is faster; one that fails gives its DataError."""
        tools = [each.meta.get("tools") for each in conversations]
        return self._segments_of([each.messages for each in conversations], loss_on, control_tokens, tools)

    def _segments_of(
        self,
        chats: Sequence[Sequence[ChatMessage]],
        loss_on: str,
        control_tokens: Collection[str],
        tools: Sequence[Any],
    ) -> list[list[Segment] | DataError]:
        require_loss_on(loss_on)
        drafts = [
            Draft.of(messages, loss_on, control_tokens, own, self._always_written)
            for messages, own in zip(chats, tools, strict=True)
        ]
        self._render([draft for draft in drafts if not draft.error], Draft.beginnings, Draft.compare)
        for trimmed in (False, True):
            self._render(
                [draft for draft in drafts if draft.missing], partial(Draft.framed, trimmed=trimmed), Draft.find_framed
            )
        lead, trail = _trained_around(self.source)
        for draft in drafts:
            draft.widen(lead, trail)
        return [draft.segments(loss_on == "all") for draft in drafts]

    def _render(
        self, drafts: list[Draft], request: Callable[[Draft], Chat], take: Callable[[Draft, list[str]], None]
    ) -> None:
        results = WORKER.render(self.source, self._variables, [request(draft) for draft in drafts]) if drafts else []
        for draft, texts in zip(drafts, results, strict=True):
            if isinstance(texts, DataError):
                draft.error = texts
            else:
                take(draft, texts)

    @cached_property
    def _always_written(self) -> str:
        """What stands at the end of any chat, asked for or not: Llama 3's first template opens an answer there."""
        [texts] = WORKER.render(self.source, self._variables, [([], [(0, False)], None)])
        return "" if isinstance(texts, DataError) else GENERATION_MARKS.sub("", texts[0])

    @property
    def _variables(self) -> dict[str, Any]:
        return {**self.special_tokens, "documents": None}


@lru_cache(maxsize=16)
def _trained_around(source: str) -> tuple[str, str]:
    """Text before and after an answer that is trained with it, for templates that TRL's training templates know."""
    digest = hashlib.sha256(source.strip().encode("utf-8")).hexdigest()
    known = load_bank("training_spans")["templates"].get(digest, {})
    return known.get("lead", ""), known.get("trail", "")


def special_tokens(folder: Path) -> dict[str, str]:
    """{"bos_token": "<s>"} of a model folder, from plain strings or {"content": "<s>"}."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder, empty when the file is not there. Raises DataError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} of the model {path.parent.name!r} cannot be read: {error}.") from error
    return value if isinstance(value, dict) else {}


def _template_source(folder: Path) -> str | None:
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                return file.read().replace("\r\n", "\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{path.name} of the model {folder.name!r} cannot be read: {error}.") from error
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
