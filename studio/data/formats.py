"""Recognises the common layouts of chat data (see FORMATS) and turns rows into conversations."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studio.data.rows import RawRow, defect, place, read_rows, scan_rows
from studio.errors import DataError
from studio.paths import atomic_path

__all__ = [
    "FORMATS",
    "Conversation",
    "FormatGuess",
    "Imported",
    "Message",
    "RowProblem",
    "import_rows",
    "read_conversations",
    "read_rows",
    "recognise",
    "to_conversation",
    "write_conversations",
]

ROLES = ("system", "user", "assistant")
FORMATS = ("messages", "xtuner", "alpaca", "sharegpt")
SHOWN_PROBLEMS = 20
LAYOUTS = (
    'Allowed rows: {"messages": [{"role", "content"}]}, {"conversation": [{"system", "input", "output"}]}, '
    '{"instruction", "input", "output"} or {"conversations": [{"from", "value"}]}.'
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}


@dataclass(frozen=True)
class Message:
    """One turn. `trained` None follows the config's rule, True or False overrides it for this turn."""

    role: str
    content: str
    trained: bool | None = None

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        return row if self.trained is None else row | {"trained": self.trained}


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user and assistant after an optional system message, and notes about them."""

    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The canonical row of a data file."""
        row: dict[str, Any] = {"messages": [message.to_row() for message in self.messages]}
        return row | {"meta": self.meta} if self.meta else row

    @classmethod
    def from_row(cls, row: object) -> "Conversation":
        """Read a canonical row; DataError when it is not one."""
        return to_conversation(row, "messages", 1)


@dataclass(frozen=True)
class FormatGuess:
    """The layout of a row (one of FORMATS, None when it is none of them) and the reason in words."""

    name: str | None
    reason: str


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used; `where` is 'row 3' or 'row 3 (line 5)'."""

    row: int
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Imported:
    """Good rows of a file and the problems of the others; conversation i stood in row `row_numbers[i]`."""

    conversations: list[Conversation]
    problems: list[RowProblem]
    row_numbers: list[int]


class _Bad(Exception):
    """What is wrong with the row at hand; becomes a DataError or a RowProblem."""


def recognise(row: object) -> FormatGuess:
    """Tell the layout of a row by its keys. Never raises."""
    if not isinstance(row, dict):
        return FormatGuess(None, f"a row must be an object, this one is {_kind(row)}. {LAYOUTS}")
    for key, name in (("messages", "messages"), ("conversation", "xtuner")):
        if isinstance(row.get(key), list):
            return FormatGuess(name, f'it has a list "{key}".')
    if isinstance(row.get("conversations"), list):
        turns = row["conversations"]
        if turns and isinstance(turns[0], dict) and "role" in turns[0]:
            return FormatGuess("messages", 'it has a list "conversations" of role and content.')
        return FormatGuess("sharegpt", 'it has a list "conversations".')
    if "instruction" in row and "output" in row:
        return FormatGuess("alpaca", 'it has "instruction" and "output".')
    keys = ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"
    return FormatGuess(None, f"its keys are {keys}. {LAYOUTS}")


def to_conversation(row: object, format: str | None, row_number: int) -> Conversation:
    """Turn a row of the given format (None: recognise it) into a conversation. DataError names the row."""
    try:
        return _convert(row, format)
    except _Bad as bad:
        raise DataError(f"row {row_number}: {bad}", "Correct the row, or leave it out.") from None


def import_rows(path: Path, format: str | None = None) -> Imported:
    """Read a whole file and keep the good rows beside the problems of the bad ones.

    Raises DataError only when the file as a whole cannot be read.
    """
    _require_format(format)
    imported = Imported([], [], [])
    for raw in scan_rows(path):
        try:
            imported.conversations.append(_convert_raw(raw, format))
            imported.row_numbers.append(raw.number)
        except _Bad as bad:
            imported.problems.append(RowProblem(raw.number, place(raw), str(bad)))
    return imported


def read_conversations(path: Path, format: str | None = None) -> list[Conversation]:
    """All rows of a file as conversations; one DataError lists every row that cannot be used."""
    imported = import_rows(path, format)
    if not imported.problems:
        return imported.conversations
    shown = "\n".join(f"  - {problem}" for problem in imported.problems[:SHOWN_PROBLEMS])
    more = len(imported.problems) - SHOWN_PROBLEMS
    tail = f"\n  and {more} more" if more > 0 else ""
    total = len(imported.problems) + len(imported.conversations)
    raise DataError(
        f"{Path(path).name}: {len(imported.problems)} of {total} rows cannot be used:\n{shown}{tail}\n",
        "Correct these rows, or import the good ones only.",
    )


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write the canonical data file; what stood there stays until the new one is complete."""
    with atomic_path(Path(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for conversation in conversations:
            file.write(canonical_json(conversation.to_row()) + "\n")


def canonical_json(value: Any) -> str:
    """JSON on one line, characters as they are; DataError for what JSON or UTF-8 cannot hold."""
    if problem := defect(value):
        raise DataError(f"The conversation {problem}", "Correct the text before it is saved.")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _require_format(format: str | None) -> None:
    if format not in (None, *FORMATS):
        raise DataError(f"Unknown format {format!r}.", f"Allowed: {', '.join(FORMATS)}.")


def _convert_raw(raw: RawRow, format: str | None) -> Conversation:
    if raw.problem:
        raise _Bad(raw.problem)
    return _convert(raw.value, format)


def _convert(row: object, format: str | None) -> Conversation:
    _require_format(format)
    guess = recognise(row)
    name = format or guess.name
    if name is None or not isinstance(row, dict):
        raise _Bad(f"the format is not recognised: {guess.reason}")
    messages = CONVERTERS[name](row)
    if problem := role_order_problem(messages):
        raise _Bad(problem)
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise _Bad(f'"meta" must be an object, not {_kind(meta)}.')
    conversation = Conversation(tuple(messages), dict(meta or {}))
    if problem := defect(conversation.to_row()):
        raise _Bad(problem)
    return conversation


def role_order_problem(messages: Iterable[Message]) -> str:
    """Why this order of roles cannot be trained; "" when user and assistant alternate, assistant last."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        return "the conversation is empty; it needs at least a user and an assistant message."
    for index, role in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if role != expected:
            number = index + 1 + len(roles) - len(turns)
            return f"message {number} is from {role!r}, expected {expected!r}: they must alternate."
    if turns[-1] != "assistant":
        return "the last message is from 'user'; it must be the assistant's answer."
    return ""


def _from_messages(row: dict[str, Any]) -> list[Message]:
    turns = row.get("messages", row.get("conversations"))
    return [_message(turn, index) for index, turn in enumerate(_list(turns, "messages"), start=1)]


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise _Bad(f"message {number} must be an object with role and content, not {_kind(turn)}.")
    role = turn.get("role")
    if role not in ROLES:
        raise _Bad(f"message {number} has the role {_short(role)}; allowed are {', '.join(ROLES)}.")
    if turn.get("tool_calls"):
        raise _Bad(f"message {number} calls a tool; allowed are text messages from {', '.join(ROLES)}.")
    content = _text(turn.get("content"), f"the content of message {number}")
    return Message(role, content, _trained(turn, number))


def _trained(turn: dict[str, Any], number: int) -> bool | None:
    """The override under our name, XTuner's (`loss`, `output_with_loss`) or OpenAI's (`weight`)."""
    for key in ("trained", "loss", "output_with_loss", "weight"):
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value in (0, 1):
            return bool(value)
        raise _Bad(f'"{key}" of message {number} is {_short(value)}; allowed are true and false.')
    return None


def _text(content: object, where: str) -> str:
    """A string, or a list of text blocks joined by line breaks."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        if all(isinstance(block, dict) and isinstance(block.get("text"), str) for block in content):
            return "\n".join(block["text"] for block in content)
        raise _Bad(f"{where} must hold text blocks only; images and other blocks cannot be trained.")
    raise _Bad(f"{where} must be text, not {_kind(content)}.")


def _from_xtuner(row: dict[str, Any]) -> list[Message]:
    messages = []
    for number, turn in enumerate(_list(row.get("conversation"), "conversation"), start=1):
        if not isinstance(turn, dict):
            raise _Bad(f"turn {number} must be an object with input and output, not {_kind(turn)}.")
        system = turn.get("system") or ""
        if system and number > 1:
            raise _Bad(f"turn {number} has a system message; only the first turn may have one.")
        if system:
            messages.append(Message("system", _text(system, "system")))
        messages.append(Message("user", _text(turn.get("input"), f"the input of turn {number}")))
        answer = _text(turn.get("output"), f"the output of turn {number}")
        messages.append(Message("assistant", answer, _trained(turn, number)))
    return messages


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    system = _text(row.get("system") or "", "system")
    messages = [Message("system", system)] if system else []
    for number, pair in enumerate(_list(row.get("history") or [], "history", allow_empty=True), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Bad(f"history entry {number} must be a list of question and answer, not {_short(pair)}.")
        messages.append(Message("user", _text(pair[0], f"the question of history entry {number}")))
        messages.append(Message("assistant", _text(pair[1], f"the answer of history entry {number}")))
    parts = [_text(row.get("instruction"), "instruction"), _text(row.get("input") or "", "input")]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", _text(row.get("output"), "output")))
    return messages


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    system = _text(row.get("system") or "", "system")
    messages = [Message("system", system)] if system else []
    for number, turn in enumerate(_list(row.get("conversations"), "conversations"), start=1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise _Bad(f"turn {number} is from {_short(speaker)}; allowed are {', '.join(SHAREGPT_ROLES)}.")
        content = _text(turn.get("value"), f"the value of turn {number}")
        messages.append(replace(Message(SHAREGPT_ROLES[speaker], content), trained=_trained(turn, number)))
    return messages


CONVERTERS = {
    "messages": _from_messages,
    "xtuner": _from_xtuner,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
}


def _list(value: object, name: str, allow_empty: bool = False) -> list[Any]:
    if not isinstance(value, list):
        raise _Bad(f'"{name}" must be a list, not {_kind(value)}.')
    if not value and not allow_empty:
        raise _Bad(f'"{name}" is empty; it needs at least a user and an assistant message.')
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {_short(value)}")
