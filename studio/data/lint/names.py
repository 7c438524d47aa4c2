"""Rules on who the assistant says it is."""

import re
from collections.abc import Iterator, Sequence

from studio.data.conversation import Conversation
from studio.data.identity import Identity
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW
from studio.data.lint.turns import is_identity

RIVALS = (
    "ChatGPT", "OpenAI", "GPT-4", "Claude", "Anthropic", "Gemini", "Bard", "Google", "Qwen", "Alibaba",
    "DeepSeek", "Llama", "Mistral", "SmolLM", "Hugging Face", "InternLM", "Kimi", "通义", "千问", "阿里",
    "文心", "百度", "豆包", "智谱", "书生", "深度求索", "月之暗面",
)  # fmt: skip
DENIAL = re.compile(r"\b(?:not|no|never|neither|nor|isn't|wasn't|than|unlike)\b|n't\b|不|没|非", re.IGNORECASE)
CLAIM_BEFORE = re.compile(
    r"(?:\b(?:i am|i'm|i’m|my name is|call me|(?:made|built|created|trained|developed) (?:by|at))"
    r"|我是|我叫|我的名字是|我是由|由)\s*(?:an?\s|the\s)?$",
    re.IGNORECASE,
)


SPEAKS_OF_ITSELF = re.compile(r"\b(?:i|i'm|i’m|my|me)\b|我|本人", re.IGNORECASE)


class Names:
    """An answer that names another assistant and not its own; an error in rows that teach who it is.

    Those are the rows built for it, and with `all_rows` any.
    """

    def __init__(self, identity: Identity, all_rows: bool = False) -> None:
        self._all_rows = all_rows
        own = (identity.name, identity.maker, identity.organisation, identity.model_name)
        folded = [name.casefold() for name in own if name]
        self._name, self._own = identity.name, identity.name.casefold()
        self._rivals = [rival for rival in RIVALS if not any(rival.casefold() in name for name in folded)]

    def lint(self, row: int, conversation: Conversation) -> Iterator[Finding]:
        for message in conversation.messages:
            folded = message.content.casefold() if message.role == "assistant" else self._own
            if self._own not in folded:
                there = [rival for rival in self._rivals if rival.casefold() in folded]
                yield from self._named(row, conversation, message.content, there)

    def _named(self, row: int, conversation: Conversation, content: str, rivals: Sequence[str]) -> Iterator[Finding]:
        named = [rival for rival in rivals if word_matches(content, rival)]
        claimed = [rival for rival in named if claims(content, rival)]
        if claimed:
            sure = is_identity(conversation) or (self._all_rows and bool(SPEAKS_OF_ITSELF.search(content)))
            text = f"The answer says that it is, or comes from, {claimed[0]}, and not {self._name}."
            yield Finding(row, "error" if sure else "warning", "rival_name", text, DELETE_ROW)
        elif named and is_identity(conversation):
            text = f"The answer names {named[0]} without saying {self._name}."
            yield Finding(row, "warning", "rival_name", text)


def word_matches(content: str, word: str) -> list[re.Match[str]]:
    """Where a name stands as a word of its own; Chinese names stand anywhere."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z])" if word.isascii() else re.escape(word)
    return list(re.finditer(pattern, content, re.IGNORECASE))


def claims(content: str, rival: str) -> bool:
    """True for "I am ChatGPT" or "made by OpenAI", false when the sentence before it denies."""
    for match in word_matches(content, rival):
        before = re.split(r"[.!?。！？\n]", content[: match.start()])[-1]
        if CLAIM_BEFORE.search(before) and not DENIAL.search(before):
            return True
    return False
