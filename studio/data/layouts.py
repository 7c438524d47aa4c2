"""The layouts that rows of chat data come in: each a function from a row to messages and notes that raises BadRow."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from studio.data.columns import guess_columns, messages_from
from studio.data.conversation import Conversation, Message, list_of, messages_of, text_of, trained_of
from studio.data.rows import BadRow, defect, kind_of, shortened

Row = dict[str, Any]
Converted = tuple[list[Message], dict[str, Any]]
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")
TURN_ENDS = ("need_eos_token", "sep")


def from_messages(row: Row) -> Converted:
    """OpenAI's: {"messages": [{"role", "content", "tool_calls"?, "weight"?}], "tools"?}."""
    turns = row.get("messages", row.get("conversations"))
    return messages_of(turns), _tools(row)


def from_xtuner(row: Row) -> Converted:
    """{"conversation": [{"system"?, "input"?, "output", "need_eos_token"?, "output_with_loss"?, "sep"?}]}."""
    return from_turns(list_of(row.get("conversation"), "conversation"))


def from_turns(turns: Sequence[object]) -> Converted:
    """XTuner's turns. A single one without a question is raw text."""
    messages: list[Message] = []
    ends = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} must be an object with input and output, not {kind_of(turn)}.")
        if system := text_of(turn.get("system") or "", f"the system of turn {number}"):
            messages.append(Message("system", system))
        messages.append(Message("user", text_of(turn.get("input") or "", f"the input of turn {number}")))
        answer = text_of(turn.get("output"), f"the output of turn {number}")
        messages.append(Message("assistant", answer, trained_of(turn, number)))
        ends.append({key: turn[key] for key in TURN_ENDS if turn.get(key) is not None})
    if [message.role for message in messages] == ["user", "assistant"] and not messages[0].content:
        return _document(messages[1].content)
    return messages, {"turns": ends} if any(ends) else {}


def to_turns(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation as XTuner's turns: `from_turns` reads them back. Raises BadRow for what they have no place for."""
    if (kind := conversation.meta.get("kind", "")) not in ("", "text"):
        raise BadRow(f"a row of the kind {kind!r} has no form in XTuner's turns.")
    ends = [{"need_eos_token": False}] if kind == "text" else conversation.meta.get("turns", ())
    turns: list[dict[str, Any]] = []
    asked: dict[str, str] = {}
    for message in conversation.messages:
        if message.role == "tool" or message.tool_calls:
            raise BadRow("calls of tools have no form in XTuner's turns.")
        if message.role != "assistant":
            part = "system" if message.role == "system" else "input"
            asked[part] = asked.get(part, "") + message.content
            continue
        trained = {} if message.trained is None else {"output_with_loss": message.trained}
        end = ends[len(turns)] if len(turns) < len(ends) else {}
        turns.append({"system": "", "input": ""} | asked | {"output": message.content} | trained | end)
        asked = {}
    return turns


def from_instruction(row: Row) -> Converted:
    """Alpaca's: {"instruction", "input"?, "output", "system"?, "history"?}; an empty input adds no line."""
    messages = _system(row)
    for number, pair in enumerate(list_of(row.get("history") or [], "history", allow_empty=True), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history entry {number} must be a list of question and answer, not {shortened(pair)}.")
        messages.append(Message("user", text_of(pair[0], f"the question of history entry {number}")))
        messages.append(Message("assistant", text_of(pair[1], f"the answer of history entry {number}")))
    parts = [text_of(row.get("instruction"), "instruction"), text_of(row.get("input") or "", "input")]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", text_of(row.get("output"), "output")))
    return messages, {}


def from_sharegpt(row: Row) -> Converted:
    """{"conversations": [{"from", "value"}], "system"?, "tools"?}."""
    messages = _system(row)
    for number, turn in enumerate(list_of(row.get("conversations"), "conversations"), start=1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise BadRow(f"turn {number} is from {shortened(speaker)}; allowed are {', '.join(SPEAKERS)}.")
        content = text_of(turn.get("value"), f"the value of turn {number}")
        message = Message(SPEAKERS[speaker], content, trained_of(turn, number))
        calls = _called(content) if speaker in CALLERS else ""
        messages.append(replace(message, content="", tool_calls=calls) if calls else message)
    return messages, _tools(row)


def _called(text: str) -> str:
    """A call written as {"name", "arguments"}, or a list of them; "" where the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return ""
    found = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return json.dumps([{"type": "function", "function": call} for call in found], ensure_ascii=False)


def from_completion(row: Row) -> Converted:
    """{"prompt", "completion"}, each a text or a list of messages."""
    return [*_system(row), *_said(row, "prompt", "user"), *_said(row, "completion", "assistant")], _tools(row)


def from_question(row: Row) -> Converted:
    """Columns whose names say that they are question and answer."""
    columns = guess_columns(row)
    if columns is None:
        raise BadRow(f"no column is named like a question and an answer; they are {shortened(list(row))}.")
    return messages_from(row, columns), {}


def from_text(row: Row) -> Converted:
    """{"text"}: a document for continued pretraining."""
    return _document(text_of(row.get("text", row.get("content")), "text"))


def from_preference(row: Row) -> Converted:
    """{"prompt"?, "chosen", "rejected"}: what is learned is `chosen`; `rejected` is kept beside it."""
    prompt = _prompt(row)
    chosen, rejected = (_full(prompt, row, column) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if rejected[shared].role != "assistant" or chosen[shared].role != "assistant":
        raise BadRow("chosen and rejected must answer the same prompt.")
    return chosen, {"kind": "preference", "rejected": [message.to_row() for message in rejected[shared:]]} | _tools(row)


def _prompt(row: Row) -> list[Message]:
    for column in ("prompt", "question", "instruction", "input"):
        if row.get(column) is not None:
            return [*_system(row), *_said(row, column, "user")]
    return _system(row)


def _full(prompt: list[Message], row: Row, column: str) -> list[Message]:
    """The whole conversation of one side, whether the prompt is in it or beside it."""
    said = _said(row, column, "assistant")
    return said if said[0].role != "assistant" else [*prompt, *said]


def image_of(row: Row) -> dict[str, Any]:
    """Notes on the row's image; none where it has none."""
    image = row.get("image")
    return {"kind": "image", "image": image} if isinstance(image, str) and image else {}


def _document(text: str) -> Converted:
    if not text.strip():
        raise BadRow("the text is empty.")
    return [Message("assistant", text)], {"kind": "text"}


def _system(row: Row) -> list[Message]:
    system = text_of(row.get("system") or "", "system")
    return [Message("system", system)] if system else []


def _said(row: Row, column: str, role: str) -> list[Message]:
    value = row.get(column)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return messages_of(value, column)
    return [Message(role, text_of(value, column))]


def _tools(row: Row) -> dict[str, Any]:
    """Definitions of tools, which some write as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow(f'"tools" is no JSON: {shortened(tools)}.') from None
        if problem := defect(tools):
            raise BadRow(f'"tools" {problem}')
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'"tools" must be a list of objects, not {shortened(tools)}.')
    return {"tools": tools}


LAYOUTS: dict[str, Callable[[Row], Converted]] = {
    "messages": from_messages,
    "xtuner": from_xtuner,
    "instruction": from_instruction,
    "sharegpt": from_sharegpt,
    "prompt_completion": from_completion,
    "question_answer": from_question,
    "preference": from_preference,
    "text": from_text,
}
# What they read; a ? marks a column that may be missing.
LAYOUT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools?"),
    "xtuner": ("conversation",),
    "instruction": ("instruction", "input?", "output", "system?", "history?"),
    "sharegpt": ("conversations", "system?", "tools?"),
    "prompt_completion": ("prompt", "completion", "system?", "tools?"),
    "question_answer": ("question", "answer", "system?", "history?"),
    "preference": ("prompt?", "chosen", "rejected", "system?", "tools?"),
    "text": ("text",),
}
