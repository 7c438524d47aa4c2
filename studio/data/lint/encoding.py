"""Rule on text that was decoded with the wrong encoding."""

from collections.abc import Iterator

from studio.data.conversation import Conversation
from studio.data.lint.credentials import without_secrets
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import REPAIR_TEXT
from studio.data.lint.texts import is_lost, repaired

SHOWN_CHARACTERS = 24


def lint_encoding(row: int, conversation: Conversation) -> Iterator[Finding]:
    """One finding for each message whose characters are not those that were meant."""
    for number, message in enumerate(conversation.messages, start=1):
        text = message.content
        if text.isascii():
            continue
        if (meant := repaired(text)) != text:
            was, becomes = _difference(text, meant)
            words = f"Message {number} was decoded wrongly: {was!r} should be {becomes!r}."
            yield Finding(row, "warning", "mojibake", words, REPAIR_TEXT)
        elif is_lost(text):
            words = f"Message {number} has characters that were lost when it was decoded; they cannot be repaired."
            yield Finding(row, "warning", "mojibake", words)


def _difference(text: str, meant: str) -> tuple[str, str]:
    """The first stretch where the two differ."""
    pairs = zip(text, meant, strict=False)
    start = next((place for place, (one, other) in enumerate(pairs) if one != other), 0)
    shown = slice(start, start + SHOWN_CHARACTERS)
    return without_secrets(text)[shown], without_secrets(meant)[shown]
