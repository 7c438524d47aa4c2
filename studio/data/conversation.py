"""A conversation as the studio stores it: messages with roles, and notes about them. Its row is the canonical row."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from studio.data.rows import BadRow, defect, kind_of, shortened
from studio.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}
# Role -> roles that may come next; "" stands before the first message. The first one is what is usually missing.
FOLLOWERS = {
    "": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "system", "tool"),
    "tool": ("assistant", "tool"),
}
TRAINED_KEYS = ("trained", "loss", "output_with_loss", "weight")


@dataclass(frozen=True)
class Message:
    """One turn. `trained` None follows the config's rule, True or False overrides it for this turn.

    `tool_calls` is the JSON text of a list of calls, "" for none; `name` and `tool_call_id` are those of tools.
    """

    role: str
    content: str
    trained: bool | None = None
    tool_calls: str = ""
    name: str = ""
    tool_call_id: str = ""

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.trained is not None:
            row["trained"] = self.trained
        if self.tool_calls:
            row["tool_calls"] = json.loads(self.tool_calls)
        if self.name:
            row["name"] = self.name
        if self.tool_call_id:
            row["tool_call_id"] = self.tool_call_id
        return row


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate user and assistant, and notes about them.

    System messages may stand before any user message, tool messages after an assistant. meta["kind"] names what is
    no plain chat: "text" (continued pretraining; a single assistant message), "preference" (meta["rejected"] holds
    the messages that the last ones are better than), "image" (meta["image"] is its path). meta["tools"] are the
    definitions of tools; meta["turns"] keeps XTuner's `need_eos_token` and `sep` of each turn where a turn has one.
    """

    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "chat", or what meta says: "text", "preference", "image"."""
        return str(self.meta.get("kind") or "chat")

    def to_row(self) -> dict[str, Any]:
        """The canonical row of a data file."""
        row: dict[str, Any] = {"messages": [message.to_row() for message in self.messages]}
        return row | {"meta": self.meta} if self.meta else row

    @classmethod
    def from_row(cls, row: object, decoded: bool = True) -> "Conversation":
        """Read a canonical row; DataError when it is not one. `decoded` False: it comes from `rows.parse`."""
        try:
            if not isinstance(row, dict):
                raise BadRow(f"a row must be an object, this one is {kind_of(row)}.")
            return checked(messages_of(row.get("messages")), own_meta(row), decoded)
        except BadRow as bad:
            raise DataError(f"The row cannot be used: {bad}", "Correct the row, or leave it out.") from None


def checked(messages: Sequence[Message], meta: dict[str, Any], decoded: bool = True) -> Conversation:
    """A conversation whose roles and text are fit to train. Raises BadRow.

    `decoded` False: its text comes from a row that was checked already, and was not decoded again since.
    """
    kind = meta.get("kind")
    if kind == "text":
        if [message.role for message in messages] != ["assistant"]:
            raise BadRow("raw text is a single assistant message.")
    elif problem := role_order_problem(messages):
        raise BadRow(problem)
    if kind == "preference":
        messages_of(meta.get("rejected"), "rejected")
    conversation = Conversation(tuple(messages), meta)
    if decoded and (problem := defect(conversation.to_row())):
        raise BadRow(problem)
    return conversation


def own_meta(row: dict[str, Any]) -> dict[str, Any]:
    """The row's own notes. Raises BadRow when they are not an object."""
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise BadRow(f'"meta" must be an object, not {kind_of(meta)}.')
    return dict(meta or {})


def role_order_problem(messages: Iterable[Message]) -> str:
    """Why this order of roles cannot be trained; "" when user and assistant alternate, assistant last."""
    previous, number = "", 0
    for number, message in enumerate(messages, start=1):
        if message.role not in FOLLOWERS[previous]:
            expected = FOLLOWERS[previous][0]
            return f"message {number} is from {message.role!r}, expected {expected!r}: they must alternate."
        previous = message.role
    if previous in ("", "system") and number <= 1:
        return "the conversation is empty; it needs at least a user and an assistant message."
    if previous != "assistant":
        return f"the last message is from {previous!r}; it must be the assistant's answer."
    return ""


def messages_of(turns: object, name: str = "messages") -> list[Message]:
    """Messages from a list of {role, content}. Raises BadRow."""
    return [_message(turn, number) for number, turn in enumerate(list_of(turns, name), start=1)]


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} must be an object with role and content, not {kind_of(turn)}.")
    role = turn.get("role")
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"message {number} has the role {shortened(role)}; allowed are {', '.join(ROLES)}.")
    calls = _tool_calls(turn, number)
    content = turn.get("content")
    text = "" if calls and content is None else text_of(content, f"the content of message {number}")
    message = Message(role, text, trained_of(turn, number))
    if not calls and role != "tool" and "name" not in turn:
        return message
    return Message(role, text, message.trained, calls, _word(turn, "name"), _word(turn, "tool_call_id"))


def _tool_calls(turn: dict[str, Any], number: int) -> str:
    """The calls as JSON text, in the order of keys that the row has."""
    calls = turn.get("tool_calls")
    if not calls:
        return ""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f'"tool_calls" of message {number} must be a list of objects, not {shortened(calls)}.')
    if turn.get("role") != "assistant":
        raise BadRow(f"message {number} from {turn.get('role')!r} calls a tool; only the assistant can.")
    return json.dumps(calls, ensure_ascii=False)


def _word(turn: dict[str, Any], key: str) -> str:
    value = turn.get(key)
    return value if isinstance(value, str) else ""


def trained_of(turn: dict[str, Any], number: int) -> bool | None:
    """The override under our name, XTuner's (`loss`, `output_with_loss`) or OpenAI's (`weight`). Raises BadRow."""
    for key in TRAINED_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value in (0, 1):
            return bool(value)
        raise BadRow(f'"{key}" of message {number} is {shortened(value)}; allowed are true and false.')
    return None


def text_of(content: object, where: str) -> str:
    """A string, or a list of text blocks joined by line breaks. Raises BadRow."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        if all(isinstance(block, dict) and isinstance(block.get("text"), str) for block in content):
            return "\n".join(block["text"] for block in content)
        raise BadRow(f"{where} must hold text blocks only; images and other blocks cannot be trained.")
    raise BadRow(f"{where} must be text, not {kind_of(content)}.")


def list_of(value: object, name: str, allow_empty: bool = False) -> list[Any]:
    """A list that is not empty. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow(f'"{name}" must be a list, not {kind_of(value)}.')
    if not value and not allow_empty:
        raise BadRow(f'"{name}" is empty; it needs at least a user and an assistant message.')
    return value


def canonical_json(value: Any) -> str:
    """JSON on one line, characters as they are; DataError for what JSON or UTF-8 cannot hold."""
    if problem := defect(value):
        raise DataError(f"The conversation {problem}", "Correct the text before it is saved.")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def canonical_line(conversation: Conversation) -> bytes:
    """The conversation's line in a data file. DataError as `canonical_json`."""
    row = conversation.to_row()
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer beyond 64 bits, or text that cannot be written
        return canonical_json(row).encode("utf-8") + b"\n"


def digest_line(conversation: Conversation) -> bytes:
    """What a fingerprint hashes of a conversation: its row with sorted keys, in ASCII."""
    return _DIGEST.encode(conversation.to_row()).encode("ascii") + b"\n"


_DIGEST = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
