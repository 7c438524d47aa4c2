"""Rule on held-out probes: a row that asks what a probe asks makes the score worthless."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW
from studio.data.lint.repeats import MOST_WORDS, WORD
from studio.data.lint.turns import is_identity
from studio.data.phrasings import normalise

CONTAINED = 0.8
FEWEST_GRAMS = 3
GRAM = 3

Gram = tuple[str, ...]


class Probes:
    """Knows the probes' questions, whole and as word triples."""

    def __init__(self, probes: Iterable[Mapping[str, Any]]) -> None:
        self._asked: dict[str, str] = {}
        for probe in probes:
            question = str(probe["messages"][-1]["content"])
            self._asked.setdefault(normalise(question), question)
        self._asked.pop("", None)
        self._sizes: dict[str, int] = {}
        self._having: dict[Gram, list[str]] = {}
        for question in self._asked:
            grams = _grams(question)
            if len(grams) >= FEWEST_GRAMS:
                self._sizes[question] = len(grams)
                for gram in grams:
                    self._having.setdefault(gram, []).append(question)

    def lint(self, row: int, conversation: Conversation) -> Iterator[Finding]:
        """At most one finding: the same question, or one that holds nearly all of a probe's words in their order."""
        if not self._asked:
            return
        questions = [normalise(message.content) for message in conversation.messages if message.role == "user"]
        if found := next((self._asked[question] for question in questions if question in self._asked), None):
            severity = "error" if is_identity(conversation) else "warning"
            text = f"The row asks {found[:80]!r}, a held-out probe; take it out of the rows or the probes."
            yield Finding(row, severity, "probe_in_training", text, DELETE_ROW)
        elif not is_identity(conversation):  # the builder's phrasings resemble its probes on purpose
            for question in questions:
                if near := self._near(question):
                    text = f"The row asks nearly what the held-out probe {near[:80]!r} asks."
                    yield Finding(row, "warning", "probe_in_training", text, DELETE_ROW)
                    return

    def _near(self, question: str) -> str:
        shared = Counter(probe for gram in _grams(question) for probe in self._having.get(gram, ()))
        for probe, number in shared.most_common():
            if number >= CONTAINED * self._sizes[probe]:
                return self._asked[probe]
        return ""


def _grams(question: str) -> set[Gram]:
    words = WORD.findall(question)[:MOST_WORDS]
    return {tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)}
