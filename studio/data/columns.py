"""Questions and answers from any columns: named by hand, or guessed where their names say it."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from studio.data.conversation import Message, list_of
from studio.data.rows import BadRow, kind_of, shortened
from studio.errors import DataError

ROLES = ("question", "answer", "system", "history")
# Best first; compared without case, spaces around and underscores.
QUESTIONS = (
    "question", "query", "instruction", "prompt", "input", "user", "human", "q", "问题", "提问", "问", "指令",
    "問題", "提問", "提示", "提示词", "输入", "用户", "题目", "问句", "标题",
)  # fmt: skip
ANSWERS = (
    "answer", "response", "output", "completion", "assistant", "reply", "target", "a", "回答", "答案", "答", "回复",
    "输出", "助手", "答复", "回覆", "答覆", "解答", "内容",
)  # fmt: skip
SYSTEMS = ("system", "system prompt", "系统", "系统提示", "系统提示词")
HISTORIES = ("history", "历史", "历史对话")
# Parts of longer names (患者提问, user_question), where no name is one of those above: only words that say it plainly.
QUESTION_PART = re.compile(r"\b(?:question|query|instruction|prompt)\b|提问|问题|询问|指令|提示词")
ANSWER_PART = re.compile(r"\b(?:answer|response|completion|reply)\b|回答|答案|回复|答复|解答")
# About a question or an answer, and not the text itself.
ABOUT = re.compile(
    r"\b(?:id|type|kind|category|time|date|tokens|length|score|count|number|num|system)\b"
    r"|编号|序号|类型|类别|分类|时间|日期|长度|评分|得分|数量|系统"
)
WORD_IN_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Columns:
    """Which column is what. `history` holds earlier [question, answer] pairs, as a list or as its JSON text."""

    question: str
    answer: str
    system: str = ""
    history: str = ""

    @classmethod
    def parse(cls, text: str) -> "Columns":
        """From "question=Question,answer=Answer". Raises DataError."""
        named = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
        chosen = {key.strip(): column.strip() for key, column in named.items()}
        unknown = [part for part in text.split(",") if part.split("=")[0].strip() not in ROLES]
        if unknown or not chosen.get("question") or not chosen.get("answer"):
            raise DataError(
                f"{text!r} does not say which column is the question and which the answer.",
                "For example: question=Question,answer=Answer; also system=… and history=… .",
            )
        return cls(**chosen)

    def to_text(self) -> str:
        """What `parse` reads."""
        return ",".join(f"{role}={column}" for role, column in asdict(self).items() if column)


def guess_columns(names: Iterable[str]) -> Columns | None:
    """The columns whose names are those of a question and an answer, or have such a word in them.

    None when they do not say: a part of a name counts only where it is in one column alone.
    """
    texts = [name for name in names if isinstance(name, str)]
    known = {_folded(name): name for name in texts}
    found = [next((known[word] for word in words if word in known), "") for words in _WORDS]
    question, answer, system, history = found
    question = question or _only_one(texts, QUESTION_PART, ANSWER_PART)
    answer = answer or _only_one(texts, ANSWER_PART, QUESTION_PART)
    return Columns(question, answer, system, history) if question and answer else None


_WORDS = (QUESTIONS, ANSWERS, SYSTEMS, HISTORIES)


def _only_one(names: list[str], part: re.Pattern[str], other: re.Pattern[str]) -> str:
    """The one column with this part in its name, and not the other; "" when there is none or several."""
    plain = {name: _folded(WORD_IN_CAMEL_CASE.sub(" ", name)) for name in names}
    found = [
        name for name, text in plain.items() if part.search(text) and not (other.search(text) or ABOUT.search(text))
    ]
    return found[0] if len(found) == 1 else ""


def named_exactly(columns: Columns) -> bool:
    """Whether both names are words for a question and an answer, and not only have them in them."""
    return _folded(columns.question) in QUESTIONS and _folded(columns.answer) in ANSWERS


def _folded(name: str) -> str:
    return name.casefold().strip().replace("_", " ")


def messages_from(row: dict[str, Any], columns: Columns) -> list[Message]:
    """The conversation in these columns. Raises BadRow where one is missing, or neither has text."""
    messages = []
    if columns.system and (system := _cell(row, columns.system)):
        messages.append(Message("system", system))
    for question, answer in _history(row.get(columns.history)) if columns.history else []:
        messages += [Message("user", question), Message("assistant", answer)]
    question, answer = _cell(row, columns.question), _cell(row, columns.answer)
    if not (question.strip() or answer.strip()):
        raise BadRow(f"columns {columns.question!r} and {columns.answer!r} are empty.")
    return [*messages, Message("user", question), Message("assistant", answer)]  # one that is empty the lint names


def _cell(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(f"it has no column {column!r}; its columns are {shortened(list(row))}.")
    return _text(row[column], f"column {column!r}")


def _text(value: object, where: str) -> str:
    """Numbers and booleans as they are written, null as empty."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float):
        return str(value)
    raise BadRow(f"{where} must be text, not {kind_of(value)}.")


def _history(value: object) -> list[tuple[str, str]]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"the history must be a JSON list of pairs, not {shortened(value)}.") from None
    pairs = []
    for pair in list_of(value or [], "history", allow_empty=True):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"a history entry must be a list of question and answer, not {shortened(pair)}.")
        pairs.append((_text(pair[0], "a question of the history"), _text(pair[1], "an answer of the history")))
    return pairs
