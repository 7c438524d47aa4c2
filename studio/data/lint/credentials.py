"""Rule on secrets: keys and tokens of well-known services. What is found is never shown whole."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW

TRAINED_NOTES = ("rejected", "tools")  # of a row's meta: they are written into prompts or compared in training
FEWEST_DIFFERENT_CHARACTERS = 8
SHOWN_CHARACTERS = 4
# Words in keys that documentation makes up.
MADE_UP = re.compile(r"(?i:EXAMPLE|XXXX|YOUR|DUMMY|PLACEHOLDER)|\*\*\*|\.\.\.|1234567890|ABCDEFGH|abcdefgh")


@dataclass(frozen=True)
class _Secret:
    """`mark` is in every match: most texts lack it, and need no search."""

    what: str
    mark: str
    pattern: re.Pattern[str]


def _secret(what: str, mark: str, pattern: str) -> _Secret:
    return _Secret(what, mark, re.compile(rf"(?<![A-Za-z0-9_-]){pattern}(?![A-Za-z0-9])"))


SECRETS = (
    _Secret("a private key", "PRIVATE KEY-----", re.compile(
        r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY-----[\s\S]{0,300}?[A-Za-z0-9+/=\s\\]{40,}")),
    _secret("an AWS access key", "AKIA", r"AKIA[0-9A-Z]{16}"),
    _secret("a temporary AWS access key", "ASIA", r"ASIA[0-9A-Z]{16}"),
    _secret("a GitHub token", "gh", r"gh[pousr]_[A-Za-z0-9]{36}"),
    _secret("a GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{22,}"),
    _secret("a GitLab token", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
    _secret("an Anthropic key", "sk-ant-", r"sk-ant-[A-Za-z0-9_-]{24,}"),
    _secret("an OpenAI key", "sk-", r"sk-(?!ant-)(?:proj-|svcacct-)?[A-Za-z0-9_-]{32,}"),
    _secret("a Hugging Face token", "hf_", r"hf_[A-Za-z0-9]{34}"),
    _secret("a Google API key", "AIza", r"AIza[A-Za-z0-9_-]{35}"),
    _secret("a Slack token", "xox", r"xox[abprs]-[A-Za-z0-9-]{16,}"),
    _secret("a Stripe key", "_live_", r"[sr]k_live_[A-Za-z0-9]{20,}"),
    _secret("an npm token", "npm_", r"npm_[A-Za-z0-9]{36}"),
    _secret("a PyPI token", "pypi-", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}"),
    _secret("an Alibaba Cloud key", "LTAI", r"LTAI[A-Za-z0-9]{12,26}"),
    _secret("a signed web token (JWT)", "eyJ", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"),
)  # fmt: skip


def lint_secrets(row: int, conversation: Conversation) -> Iterator[Finding]:
    """One finding for each message with a secret, in its words or in its calls of tools; one for each note with one."""
    for number, message in enumerate(conversation.messages, start=1):
        if found := find_secret(message.content) or _secret_within(message.tool_calls):
            text = f"Message {number} holds what looks like {found[0]}: {masked(found[1])}."
            yield Finding(row, "error", "secret", text, DELETE_ROW)
    for name in TRAINED_NOTES:
        if found := _secret_within(conversation.meta.get(name)):
            text = f"The row's {name!r} hold what looks like {found[0]}: {masked(found[1])}."
            yield Finding(row, "error", "secret", text, DELETE_ROW)


def _secret_within(value: object) -> tuple[str, str] | None:
    """As `find_secret`, of the first text with one in lists and objects, and in the JSON that such a text may be."""
    return next((found for text in _texts(value) if (found := find_secret(text))), None)


def _texts(value: object) -> Iterator[str]:
    """JSON is taken apart first: the `n` of an escaped line break would hide the start of a key behind it.

    With a stack of its own: what comes from elsewhere may be nested deeply.
    """
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            inner = _decoded(each)
            each = inner if inner is not None else each
        if isinstance(each, dict | list):
            left += each.values() if isinstance(each, dict) else each
        elif isinstance(each, str):
            yield each


def _decoded(text: str) -> object:
    """What the text is as JSON; None where it is none."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find_secret(text: str) -> tuple[str, str] | None:
    """(what it is, the secret) of the first one in a text."""
    for secret in SECRETS:
        if secret.mark in text:
            for match in secret.pattern.finditer(text):
                if not MADE_UP.search(match[0]) and len(set(match[0])) >= FEWEST_DIFFERENT_CHARACTERS:
                    return secret.what, match[0]
    return None


def masked(secret: str) -> str:
    """Its first characters and its length."""
    return f"{secret[:SHOWN_CHARACTERS]}… ({len(secret)} characters)"


def without_secrets(text: str) -> str:
    """The text with secrets masked, for a message that quotes it."""
    for secret in SECRETS:
        if secret.mark in text:
            text = secret.pattern.sub(lambda match: masked(match[0]), text)
    return text
