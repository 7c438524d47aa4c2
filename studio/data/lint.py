"""Says what is wrong with a dataset, by row, before anything is trained. Errors block a start."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.data.formats import Conversation, Message, role_order_problem
from studio.data.identity import Identity
from studio.data.phrasings import normalise
from studio.data.tokens import Example
from studio.errors import DataError

SLOT = "(?:your[ _])?(?:name|author|maker|creator|developer|company|organi[sz]ation|model(?:[ _]name)?|assistant)"
PLACEHOLDER = re.compile(rf"\{{\{{\s*{SLOT}\s*\}}\}}|\{{\s*{SLOT}\s*\}}|<\s*{SLOT}\s*>|\[\s*{SLOT}\s*\]", re.IGNORECASE)
CONTROL_TOKEN = re.compile(r"<[|｜][^\s<>|｜]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>")
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
CLAIMED_NAME = re.compile(
    r"(?:\b(?:I am|I'm|I’m|[Mm]y name is|[Cc]all me)\s+([A-Z][\w-]*)|(?:我叫|我的名字是)\s*([^\W_]{1,12}))"
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `row` counts from 1; `severity` is "error" or "warning"."""

    row: int
    severity: str
    rule: str
    message: str


Encode = Callable[[Conversation], Example]


def lint(
    conversations: Sequence[Conversation],
    identity: Identity | None = None,
    probes: Iterable[Mapping[str, Any]] = (),
    encode: Encode | None = None,
    control_tokens: Collection[str] = (),
) -> list[Finding]:
    """All findings, by row.

    identity: whom the data teaches, for the rules on names. probes: held-out probe rows. encode: a row's
    tokens, usually `encode_conversation` with its other arguments bound, for the rules on length and labels.
    control_tokens: those of the tokenizer.
    """
    findings: list[Finding] = []
    for row, conversation in enumerate(conversations, start=1):
        findings += _lint_turns(row, conversation, control_tokens)
        findings += _lint_names(row, conversation, identity)
    findings += _duplicates(conversations)
    findings += _contradictions(conversations)
    findings += _probes_in_training(conversations, probes)
    if encode is not None:
        findings += _lint_tokens(conversations, encode)
    return sorted(findings, key=lambda finding: (finding.row, finding.severity, finding.rule, finding.message))


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _lint_turns(row: int, conversation: Conversation, control_tokens: Collection[str]) -> list[Finding]:
    findings = []
    if problem := role_order_problem(conversation.messages):
        findings.append(Finding(row, "error", "role_order", problem))
    for number, message in enumerate(conversation.messages, start=1):
        if not message.content.strip():
            text = f"Message {number} from {message.role!r} is empty."
            findings.append(Finding(row, "error", "empty_turn", text))
        if found := PLACEHOLDER.search(message.content):
            sure = _is_identity(conversation) or (found[0].startswith("{{") and found[0].upper() == found[0])
            text = f"Message {number} still has the placeholder {found[0]!r}; put the real value in its place."
            findings.append(Finding(row, "error" if sure else "warning", "placeholder", text))
        if token := _control_token(message.content, control_tokens):
            text = f"Message {number} has the control token {token!r}; it is trained as ordinary text."
            findings.append(Finding(row, "warning", "control_token", text))
    return findings


def _control_token(content: str, control_tokens: Collection[str]) -> str:
    found = CONTROL_TOKEN.search(content)
    return found[0] if found else next((token for token in control_tokens if token in content), "")


def _is_identity(conversation: Conversation) -> bool:
    return conversation.meta.get("source") == "identity"


def _lint_names(row: int, conversation: Conversation, identity: Identity | None) -> list[Finding]:
    """An answer that names another assistant and not its own; an error in rows that teach who it is."""
    if identity is None:
        return []
    own = [name.casefold() for name in (identity.name, identity.maker, identity.organisation, identity.model_name)]
    rivals = [rival for rival in RIVALS if not any(rival.casefold() in name for name in own if name)]
    findings = []
    for message in conversation.messages:
        if message.role != "assistant" or own[0] in message.content.casefold():
            continue
        named = [(rival, _claims(message.content, rival)) for rival in rivals if _has_word(message.content, rival)]
        claimed = [rival for rival, claims in named if claims]
        if claimed:
            severity = "error" if _is_identity(conversation) else "warning"
            text = f"The answer says that it is, or comes from, {claimed[0]}, and not {identity.name}."
            findings.append(Finding(row, severity, "rival_name", text))
        elif named and _is_identity(conversation):
            text = f"The answer names {named[0][0]} without saying {identity.name}."
            findings.append(Finding(row, "warning", "rival_name", text))
    return findings


def _word_matches(content: str, word: str) -> list[re.Match[str]]:
    """Where a name stands as a word of its own; Chinese names stand anywhere."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z])" if word.isascii() else re.escape(word)
    return list(re.finditer(pattern, content, re.IGNORECASE))


def _has_word(content: str, word: str) -> bool:
    return bool(_word_matches(content, word))


def _claims(content: str, rival: str) -> bool:
    """True for "I am ChatGPT" or "made by OpenAI", false when the sentence before it denies."""
    for match in _word_matches(content, rival):
        before = re.split(r"[.!?。！？\n]", content[: match.start()])[-1]
        if CLAIM_BEFORE.search(before) and not DENIAL.search(before):
            return True
    return False


def _duplicates(conversations: Sequence[Conversation]) -> list[Finding]:
    groups: dict[tuple[Message, ...], list[int]] = defaultdict(list)
    for row, conversation in enumerate(conversations, start=1):
        groups[conversation.messages].append(row)
    return [
        Finding(
            rows[0],
            "warning",
            "duplicate",
            f"The same conversation stands in {len(rows)} rows: {_rows(rows)}.",
        )
        for rows in groups.values()
        if len(rows) > 1
    ]


def _contradictions(conversations: Sequence[Conversation]) -> list[Finding]:
    """Identity rows that give different names in answer to the same question."""
    claims: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for row, conversation in enumerate(conversations, start=1):
        if not _is_identity(conversation) or not conversation.messages:
            continue
        question = tuple(normalise(message.content) for message in conversation.messages[:-1])
        if found := CLAIMED_NAME.search(conversation.messages[-1].content):
            claims[question].setdefault(found[1] or found[2], row)
    findings = []
    for names in claims.values():
        if len(names) > 1:
            told = ", ".join(f"{name} (row {row})" for name, row in list(names.items())[:5])
            text = f"The same question is answered with different names: {told}."
            findings.append(Finding(min(names.values()), "warning", "contradiction", text))
    return findings


def _probes_in_training(conversations: Sequence[Conversation], probes: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Training rows that ask what a probe asks: the score would no longer be about unseen questions."""
    asked = {}
    for probe in probes:
        question = str(probe["messages"][-1]["content"])
        asked[normalise(question)] = question
    findings = []
    for row, conversation in enumerate(conversations, start=1):
        questions = [normalise(message.content) for message in conversation.messages if message.role == "user"]
        if found := next((asked[question] for question in questions if question in asked), None):
            severity = "error" if _is_identity(conversation) else "warning"
            text = f"The row asks {found[:80]!r}, a held-out probe; take it out of the rows or the probes."
            findings.append(Finding(row, severity, "probe_in_training", text))
    return findings


def _lint_tokens(conversations: Sequence[Conversation], encode: Encode) -> list[Finding]:
    findings, untrained, refused = [], [], 0
    for row, conversation in enumerate(conversations, start=1):
        try:
            example = encode(conversation)
        except DataError as error:
            findings.append(Finding(row, "error", "template", str(error)))
            refused += 1
            continue
        if example.num_trained_tokens == 0:
            untrained.append(row)
        elif example.truncated:
            text = f"The row is too long; only its first {len(example.input_ids)} tokens are used (max_length)."
            findings.append(Finding(row, "warning", "truncated", text))
    severity = "error" if len(untrained) + refused == len(conversations) else "warning"
    text = "No token of this row is trained; it is left out."
    return findings + [Finding(row, severity, "no_trained_tokens", text) for row in untrained]


def _rows(rows: Sequence[int], most: int = 10) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return shown if len(rows) <= most else f"{shown} and {len(rows) - most} more"
