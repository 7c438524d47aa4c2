"""Rules on one row's messages: images, empty turns, roles, placeholders, control tokens, blanks, answers cut short."""

import re
from collections.abc import Collection, Iterator

from studio.data.conversation import Conversation, Message, role_order_problem
from studio.data.languages import language_of
from studio.data.lint.credentials import without_secrets
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import CUT_TO_SENTENCE, DELETE_ROW, DROP_LAST_TURN, DROP_MESSAGE, STRIP_CONTROL, STRIP_SPACE
from studio.data.lint.texts import (
    CONTROL_TOKEN,
    is_cut_short,
    stripped,
    whole_sentences,
    without_control_end,
    without_last_turn,
)

SLOT = "(?:your[ _])?(?:name|author|maker|creator|developer|company|organi[sz]ation|model(?:[ _]name)?|assistant)"
PLACEHOLDER = re.compile(rf"\{{\{{\s*{SLOT}\s*\}}\}}|\{{\s*{SLOT}\s*\}}|<\s*{SLOT}\s*>|\[\s*{SLOT}\s*\]", re.IGNORECASE)
ABOUT_LANGUAGE = re.compile(
    r"translat|english|chinese|language|翻译|译|英文|英语|中文|汉语|语言|外语|词汇|单词|拼音|code|代码|函数|sql|python",
    re.IGNORECASE,
)
SHORTEST_TELLING_ANSWER = 40


def is_identity(conversation: Conversation) -> bool:
    """Whether the row was built to teach who the assistant is."""
    return conversation.meta.get("source") == "identity"


def lint_turns(row: int, conversation: Conversation, control_tokens: Collection[str]) -> Iterator[Finding]:
    """What is wrong with the messages of a row."""
    if conversation.kind == "image":
        yield Finding(row, "error", "image", "The row is about an image, which cannot be trained yet.")
    if conversation.kind != "text" and (problem := role_order_problem(conversation.messages)):
        fix = DROP_LAST_TURN if without_last_turn(conversation) else DELETE_ROW
        yield Finding(row, "error", "role_order", problem, fix)
    for number, message in enumerate(conversation.messages, start=1):
        if not message.content.strip():
            yield from _empty(row, conversation, number, message)
            continue
        yield from _placeholder(row, conversation, number, message.content)
        if token := control_token(message.content, control_tokens):
            at_end = without_control_end(message.content) != message.content
            text = f"Message {number} has the control token {token!r}; it is trained as ordinary text."
            yield Finding(row, "warning", "control_token", text, STRIP_CONTROL if at_end else "")
        if message.role == "assistant" and message.trained is not False and conversation.kind != "text":
            yield from _answer(row, number, message.content)
    yield from _other_language(row, conversation)


def control_token(content: str, control_tokens: Collection[str]) -> str:
    """The first control token in a text, "" when there is none."""
    if "<" in content or "[" in content:
        if found := CONTROL_TOKEN.search(content):
            return found[0]
    return next((token for token in control_tokens if token in content), "")


def _empty(row: int, conversation: Conversation, number: int, message: Message) -> Iterator[Finding]:
    if message.tool_calls or message.role == "tool":
        return
    fix = DELETE_ROW
    if message.role == "system":
        fix = DROP_MESSAGE
    elif shorter := without_last_turn(conversation):
        fix = DROP_LAST_TURN if len(shorter.messages) < number else DELETE_ROW
    yield Finding(row, "error", "empty_turn", f"Message {number} from {message.role!r} is empty.", fix)


def _placeholder(row: int, conversation: Conversation, number: int, content: str) -> Iterator[Finding]:
    if not ("{" in content or "<" in content or "[" in content):
        return
    if found := PLACEHOLDER.search(content):
        sure = is_identity(conversation) or (found[0].startswith("{{") and found[0].upper() == found[0])
        text = f"Message {number} still has the placeholder {found[0]!r}; put the real value in its place."
        yield Finding(row, "error" if sure else "warning", "placeholder", text)


def _answer(row: int, number: int, content: str) -> Iterator[Finding]:
    if stripped(content) != content:
        text = f"Message {number} begins or ends with blank characters; they are trained with the answer."
        yield Finding(row, "warning", "outer_space", text, STRIP_SPACE)
    if is_cut_short(content):
        fix = CUT_TO_SENTENCE if whole_sentences(content) else ""
        text = f"Message {number} seems to end in the middle: …{without_secrets(content).rstrip()[-40:]!r}."
        yield Finding(row, "warning", "unfinished_answer", text, fix)


def _other_language(row: int, conversation: Conversation) -> Iterator[Finding]:
    if conversation.kind == "text" or len(conversation.messages) < 2:
        return
    question, answer = conversation.messages[-2].content, conversation.messages[-1].content
    if question.isascii() and answer.isascii():
        return
    if len(answer) < SHORTEST_TELLING_ANSWER or "```" in answer or conversation.messages[-2].role != "user":
        return
    asked, answered = language_of(question[:1000]), language_of(answer[:1000])
    if {asked, answered} == {"en", "zh"} and not ABOUT_LANGUAGE.search(question):
        words = {"en": "English", "zh": "Chinese"}
        text = f"The question is in {words[asked]}, the answer in {words[answered]}."
        yield Finding(row, "warning", "other_language", text)
