"""A model's chat template: messages in, the text that is trained out, and which parts the loss counts."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.data.formats import Message
from studio.data.render_worker import WORKER
from studio.data.rendering import GENERATION_END, GENERATION_START
from studio.errors import DataError

LOSS_ON = ("assistant", "last", "all")
# Private-use characters that travel through the template with the text and tell where it went.
LITERAL_START, LITERAL_END = "\U0010fff0", "\U0010fff1"
CONTENT_START, CONTENT_END = "\U0010fff4", "\U0010fff5"
GENERATION_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")
LITERAL_MARKS = re.compile(f"[{LITERAL_START}{LITERAL_END}]")
ANY_MARK = re.compile("[\U0010fff0-\U0010fff5]")

NAMED = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}

ChatMessage = Message | Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text. `literal`: a control token from a message, encoded as plain text."""

    text: str
    trained: bool
    literal: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source and the special tokens it may name (`bos_token`, `eos_token`, …)."""

    source: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, model_folder: Path) -> "ChatTemplate":
        """The template of a model folder; DataError when it has none."""
        config = _read_json(Path(model_folder) / "tokenizer_config.json")
        special_map = _read_json(Path(model_folder) / "special_tokens_map.json")
        source = _template_source(Path(model_folder), config)
        if source is None:
            raise DataError(
                f"The model {Path(model_folder).name!r} has no chat template; base models come without one.",
                f"Choose a named template instead, allowed: {', '.join(NAMED)}.",
            )
        return cls(source, _special_tokens(special_map) | _special_tokens(config))

    @classmethod
    def named(cls, name: str, special_tokens: dict[str, str] | None = None) -> "ChatTemplate":
        """A template that ships with the studio, for models that have none."""
        if name not in NAMED:
            raise DataError(f"There is no template named {name!r}.", f"Allowed: {', '.join(NAMED)}.")
        return cls(NAMED[name], special_tokens or {})

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that shapes the text."""
        content = json.dumps([self.source, sorted(self.special_tokens.items())])
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
        """The text of a chat, the same as transformers' `apply_chat_template(tokenize=False)`."""
        turns = _as_dicts(messages)
        return GENERATION_MARKS.sub("", self._render_all([(turns, add_generation_prompt)])[0])

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
        if loss_on not in LOSS_ON:
            raise DataError(f"loss_on is {loss_on!r}.", f"Allowed: {', '.join(LOSS_ON)}.")
        turns = [_mark_literals(turn, control_tokens) for turn in _as_dicts(messages)]
        text, span_of = self._locate(turns, _needed(messages, loss_on))
        mask = bytearray([loss_on == "all"]) * len(text)
        for index, trained in _overrides(messages, loss_on).items():
            for start, end in span_of[index]:
                mask[start:end] = bytes([trained]) * (end - start)
        return _split(text, mask)

    def _locate(self, turns: list[dict[str, str]], needed: list[int]) -> tuple[str, dict[int, list[Span]]]:
        """The rendered text and, for each needed message, where its trained part lies in it."""
        assistants = [index for index in needed if turns[index]["role"] == "assistant"]
        cuts = [(len(turns), False)]
        cuts += [cut for index in assistants for cut in ((index, True), (index + 1, False)) if cut not in cuts]
        rendered = self._render_all([(turns[:length], prompt) for length, prompt in cuts])
        texts = dict(zip(cuts, rendered, strict=True))
        marked = rendered[0]
        if GENERATION_START in marked:
            return _generation_spans(marked, turns, needed)
        spans: dict[int, list[Span]] = {}
        for index in assistants:
            prefix, until = texts[index, True], texts[index + 1, False]
            if until.startswith(prefix) and marked.startswith(until):
                spans[index] = [(len(prefix), _answer_end(until, prefix, turns[index]["content"]))]
        missing = [index for index in needed if index not in spans]
        return marked, spans | (self._content_spans(turns, missing, marked) if missing else {})

    def _content_spans(self, turns: list[dict[str, str]], missing: list[int], text: str) -> dict[int, list[Span]]:
        """Frame the missing messages' content with marks and see where these land.

        Serves templates that write a turn differently once more turns follow (the prefix method fails there),
        and overrides on messages that are not answers. An answer takes what ends its turn with it.
        DataError when the marks change anything else in the text.
        """
        framed = [_frame(turn) if index in missing else turn for index, turn in enumerate(turns)]
        answers = [index for index in missing if turns[index]["role"] == "assistant"]
        whole, *tails = self._render_all([(framed, False)] + [(framed[: index + 1], False) for index in answers])
        pieces = re.split(f"{CONTENT_START}(.*?){CONTENT_END}", whole, flags=re.DOTALL)
        if "".join(pieces) != text or len(pieces) != 2 * len(missing) + 1:
            raise DataError(
                f"The chat template rewrites message {missing[0] + 1}, so its part cannot be found.",
                'Use loss_on "all", or a template whose text for a turn does not depend on later turns.',
            )
        ends = {index: tail.rpartition(CONTENT_END)[2].rstrip() for index, tail in zip(answers, tails, strict=True)}
        spans, position = {}, 0
        for index, before, content in zip(missing, pieces[::2], pieces[1::2], strict=False):
            start = position + len(before)
            position = start + len(content)
            ending = ends.get(index, "")
            spans[index] = [(start, position + len(ending) * text.startswith(ending, position))]
        return spans

    def _render_all(self, requests: list[tuple[list[dict[str, str]], bool]]) -> list[str]:
        base = {**self.special_tokens, "tools": None, "documents": None}
        variables = [base | {"messages": turns, "add_generation_prompt": prompt} for turns, prompt in requests]
        return WORKER.render(self.source, variables)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} of the model {path.parent.name!r} cannot be read: {error}.") from error
    return value if isinstance(value, dict) else {}


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                return file.read().replace("\r\n", "\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{path.name} of the model {folder.name!r} cannot be read: {error}.") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>"} from plain strings or {"content": "<s>"}."""
    contents = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _as_dicts(messages: Iterable[ChatMessage]) -> list[dict[str, str]]:
    turns = []
    for message in messages:
        row = message.to_row() if isinstance(message, Message) else message
        role, content = row.get("role"), row.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"A message has role {role!r} and content {content!r}.", "Both must be text.")
        turns.append({"role": role, "content": content})
    if not turns:
        raise DataError("The conversation has no messages.", "Give at least one message.")
    if any(ANY_MARK.search(turn["content"]) for turn in turns):
        raise DataError("A message holds one of the private characters U+10FFF0 to U+10FFF5.", "Take it out.")
    return turns


def _mark_literals(turn: dict[str, str], control_tokens: Collection[str]) -> dict[str, str]:
    found = sorted((token for token in control_tokens if token in turn["content"]), key=len, reverse=True)
    if not found:
        return turn
    pattern = "|".join(re.escape(token) for token in found)
    marked = re.sub(pattern, lambda match: f"{LITERAL_START}{match[0]}{LITERAL_END}", turn["content"])
    return turn | {"content": marked}


def _frame(turn: dict[str, str]) -> dict[str, str]:
    return turn | {"content": f"{CONTENT_START}{turn['content']}{CONTENT_END}"}


def _overrides(messages: Sequence[ChatMessage], loss_on: str) -> dict[int, bool]:
    """Message index -> trained, for those messages whose part differs from the text's default."""
    answers = [index for index, message in enumerate(messages) if _role(message) == "assistant"]
    chosen: dict[int, bool] = {}
    if loss_on != "all":
        chosen = dict.fromkeys(answers if loss_on == "assistant" else answers[-1:], True)
    own = {index: message.trained for index, message in enumerate(messages) if isinstance(message, Message)}
    chosen |= {index: trained for index, trained in own.items() if trained is not None}
    return {index: trained for index, trained in chosen.items() if trained != (loss_on == "all")}


def _needed(messages: Sequence[ChatMessage], loss_on: str) -> list[int]:
    return sorted(_overrides(messages, loss_on))


def _role(message: ChatMessage) -> str:
    return message.role if isinstance(message, Message) else str(message["role"])


def _answer_end(until: str, prefix: str, content: str) -> int:
    """Where an answer and its end-of-turn token end; white space counts when nothing else ends the turn."""
    answer, content = until[len(prefix) :].rstrip(), content.rstrip()
    nothing_else = answer.endswith(content) if content else not answer
    return len(until) if nothing_else else len(prefix) + len(answer)


def _generation_spans(marked: str, turns: list[dict[str, str]], needed: list[int]) -> tuple[str, dict[int, list[Span]]]:
    """The spans that the template itself marks; there must be one for each assistant message."""
    pieces = GENERATION_MARKS.split(marked)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    spans = [(starts[number], starts[number + 1]) for number in range(1, len(pieces), 2)]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(spans) != len(answers):
        raise DataError(
            f"The chat template marks {len(spans)} generated parts for {len(answers)} assistant messages.",
            'Use loss_on "all", or correct the template\'s generation tags.',
        )
    by_message = {index: [span] for index, span in zip(answers, spans, strict=True)}
    if odd := [index for index in needed if index not in by_message]:
        raise DataError(
            f"Message {odd[0] + 1} is not an answer, and this chat template marks answers only.",
            "Leave out `trained` there.",
        )
    return "".join(pieces), by_message


def _split(text: str, mask: bytearray) -> list[Segment]:
    """Cut where the mask changes and at the literal marks, which are left out."""
    marks = [match.start() for match in LITERAL_MARKS.finditer(text)]
    changes = [match.end() for match in re.finditer(rb"\x00+|\x01+", bytes(mask))]
    cuts = sorted({0, *changes, *marks, *(mark + 1 for mark in marks)})
    segments, literal = [], False
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = text[start:end]
        if LITERAL_MARKS.fullmatch(piece):
            literal = piece == LITERAL_START
        else:
            segments.append(Segment(piece, bool(mask[start]), literal))
    return segments
