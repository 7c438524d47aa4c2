"""Fixes that are safe to make by a button, as pure functions on conversations."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from studio.data.conversation import Conversation, Message
from studio.data.lint.findings import Finding
from studio.data.lint.texts import repaired, stripped, whole_sentences, without_control_end, without_last_turn
from studio.errors import DataError

DELETE_ROW = "delete_row"
DELETE_DUPLICATES = "delete_duplicates"
DROP_LAST_TURN = "drop_last_turn"
DROP_MESSAGE = "drop_empty_system"
STRIP_SPACE = "strip_space"
STRIP_CONTROL = "strip_control_tokens"
CUT_TO_SENTENCE = "cut_to_sentence"
REPAIR_TEXT = "repair_text"

# What the fix does, for a button and for the history of versions.
FIX_WORDS = {
    DELETE_ROW: "delete the row",
    DELETE_DUPLICATES: "keep the first of the equal rows",
    DROP_LAST_TURN: "drop what comes after the last whole answer",
    DROP_MESSAGE: "drop the empty system message",
    STRIP_SPACE: "strip the blank characters",
    STRIP_CONTROL: "drop the control tokens at the end",
    CUT_TO_SENTENCE: "cut the answer back to its last whole sentence",
    REPAIR_TEXT: "repair the text's encoding",
}


def apply_fix(conversations: Iterable[Conversation], finding: Finding) -> list[Conversation]:
    """New conversations in which a finding is fixed. Raises DataError when it has no safe fix."""
    return list(apply_fixes(conversations, [finding]))


def apply_fixes(conversations: Iterable[Conversation], findings: Iterable[Finding]) -> Iterator[Conversation]:
    """As `apply_fix` for findings of the same rows, in one pass. A row with several fixes gets them in turn."""
    wanted: dict[int, list[str]] = {}
    for finding in findings:
        if finding.fix not in FIX_WORDS:
            raise DataError(f"Row {finding.row}: there is no safe fix for {finding.rule!r}.", "Edit the row by hand.")
        wanted.setdefault(finding.row, []).append(finding.fix)
    return _fixed(conversations, wanted)


def _fixed(conversations: Iterable[Conversation], wanted: dict[int, list[str]]) -> Iterator[Conversation]:
    once: set[tuple[Message, ...]] = set()
    for row, conversation in enumerate(conversations, start=1):
        if conversation.messages in once:
            continue
        fixed: Conversation | None = conversation
        for fix in wanted.get(row, ()):
            if fix == DELETE_DUPLICATES:
                once.add(conversation.messages)
            elif fixed is not None:
                fixed = _FIXES[fix](fixed)
        if fixed is not None:
            yield fixed


def _with_text(change: Callable[[str], str], roles: tuple[str, ...] = ()) -> Callable[[Conversation], Conversation]:
    """A fix that changes the text of messages, of all roles when none is named."""

    def fix(conversation: Conversation) -> Conversation:
        messages = tuple(
            replace(message, content=change(message.content)) if not roles or message.role in roles else message
            for message in conversation.messages
        )
        return replace(conversation, messages=messages)

    return fix


def _without_empty_system(conversation: Conversation) -> Conversation:
    kept = (each for each in conversation.messages if each.role != "system" or each.content.strip())
    return replace(conversation, messages=tuple(kept))


def _cut_last(conversation: Conversation) -> Conversation:
    return _with_text(lambda text: whole_sentences(text) or text, ("assistant",))(conversation)


_FIXES: dict[str, Callable[[Conversation], Conversation | None]] = {
    DELETE_ROW: lambda conversation: None,
    DROP_LAST_TURN: without_last_turn,
    DROP_MESSAGE: _without_empty_system,
    STRIP_SPACE: _with_text(stripped, ("assistant",)),
    STRIP_CONTROL: _with_text(without_control_end),
    CUT_TO_SENTENCE: _cut_last,
    REPAIR_TEXT: _with_text(repaired),
}
