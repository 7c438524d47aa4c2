"""Pieces of a rendered chat: which are trained, which are text that merely looks like a control token."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from studio.data.conversation import Message
from studio.errors import DataError

TOOL_KEYS = ("tool_calls", "name", "tool_call_id")
LOSS_ON = ("assistant", "last", "all")
# Private-use characters that travel through a template with the text and tell where it went.
LITERAL_START, LITERAL_END = "\U0010fff0", "\U0010fff1"
LITERAL_MARKS = re.compile(f"([{LITERAL_START}{LITERAL_END}])")
ANY_MARK = re.compile("[\U0010fff0-\U0010fff5]")

ChatMessage = Message | Mapping[str, Any]
Turn = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the rendered text.

    `literal`: looks like a control token but came from a message; encoded as plain text. `part`: segments of
    different parts are encoded apart from each other. `ids`: used as they are, in place of encoding the text.
    """

    text: str
    trained: bool
    literal: bool = False
    part: int = 0
    ids: tuple[int, ...] = ()


def as_turns(messages: Iterable[ChatMessage]) -> list[Turn]:
    """Messages as templates see them. Raises DataError for what no template can write."""
    turns = [_turn(message) for message in messages]
    if not turns:
        raise DataError("The conversation has no messages.", "Give at least one message.")
    return turns


def _turn(message: ChatMessage) -> Turn:
    if isinstance(message, Message) and not (message.tool_calls or message.name or message.tool_call_id):
        turn = {"role": message.role, "content": message.content}  # nearly all are so
    else:
        turn = _checked_turn(message.to_row() if isinstance(message, Message) else message)
    if any(ANY_MARK.search(text) for text in _texts_of(turn) if not text.isascii()):
        raise DataError("A message holds one of the private characters U+10FFF0 to U+10FFF5.", "Take it out.")
    return turn


def _checked_turn(row: Mapping[str, Any]) -> Turn:
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"A message has role {role!r} and content {content!r}.", "Both must be text.")
    return {"role": role, "content": content} | {key: row[key] for key in TOOL_KEYS if row.get(key)}


def _texts_of(turn: Turn) -> Iterable[str]:
    """What a message says; nearly all have their content alone."""
    return (turn["content"],) if len(turn) == 2 else _texts(turn)


def _texts(value: Any) -> Iterator[str]:
    """Every text within a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def require_loss_on(loss_on: str) -> None:
    """Raises DataError for what is none of LOSS_ON."""
    if loss_on not in LOSS_ON:
        raise DataError(f"loss_on is {loss_on!r}.", f"Allowed: {', '.join(LOSS_ON)}.")


def exceptions(messages: Sequence[ChatMessage], loss_on: str) -> list[int]:
    """Indices of the messages whose part is trained when the rest is not, or with loss_on "all" the reverse.

    "assistant" trains every answer, "last" the last one; a message's own `trained` overrides.
    """
    roles = [message.role if isinstance(message, Message) else message["role"] for message in messages]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    trained = dict.fromkeys(range(len(roles)), loss_on == "all")
    if loss_on != "all":
        trained |= dict.fromkeys(answers if loss_on == "assistant" else answers[-1:], True)
    for index, message in enumerate(messages):
        if isinstance(message, Message) and message.trained is not None:
            trained[index] = message.trained
    return [index for index, counts in trained.items() if counts != (loss_on == "all")]


def mark_literals(turns: list[Turn], control_tokens: Collection[str]) -> list[Turn]:
    """Put LITERAL marks around control tokens that messages contain."""
    pattern = _pattern(tuple(control_tokens))
    if pattern is None or not any(pattern.search(text) for turn in turns for text in _texts_of(turn)):
        return turns
    return [{key: value if key == "role" else _marked(value, pattern) for key, value in turn.items()} for turn in turns]


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(f"{LITERAL_START}\\g<0>{LITERAL_END}", value)
    if isinstance(value, dict):
        return {key: _marked(each, pattern) for key, each in value.items()}
    return [_marked(each, pattern) for each in value] if isinstance(value, list) else value


@lru_cache(maxsize=16)
def _pattern(control_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, control_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def split(text: str, spans: Iterable[Span], trained: bool) -> list[Segment]:
    """Cut a text at spans, whose pieces are trained exactly when the rest is not, and at LITERAL marks.

    The marks are left out. Spans must not overlap.
    """
    pieces, position = [], 0
    for start, end in sorted(spans):
        pieces += [(text[position:start], trained), (text[start:end], not trained)]
        position = end
    pieces.append((text[position:], trained))
    if LITERAL_START not in text:
        return [Segment(piece, counts) for piece, counts in pieces if piece]
    return _without_marks(pieces)


def _without_marks(pieces: list[tuple[str, bool]]) -> list[Segment]:
    segments, literal = [], False
    for text, trained in pieces:
        for piece in LITERAL_MARKS.split(text):
            if LITERAL_MARKS.fullmatch(piece):
                literal = piece == LITERAL_START
            elif piece:
                segments.append(Segment(piece, trained, literal))
    return segments
