"""Scores of a tuned model beside its base, from marked answers: plain arithmetic, no model needed.

identity    share of held-out questions about the assistant that are answered with its new name or maker
leakage     share of held-out general questions whose answer says that name or maker though nobody asked
retention   how much worse the tuned model predicts the base's own answers to general questions (perplexity)
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from studio.data.identity import answers_identity, mentions

Z_95 = 1.959963984540054
NUM_RESAMPLES = 1000
IDENTITY_TARGET, LEAKAGE_TARGET, RETENTION_TARGET = 0.90, 0.05, 0.10
_WORDS = re.compile(r"[^\W_]+|[\u3400-\u9fff]")
_HAN = re.compile(r"([\u3400-\u9fff])")


@dataclass(frozen=True)
class MarkedAnswer:
    """One probe answered by base and tuned model. `loss` sums over the `num_tokens` of the base's reference answer.

    `passed` means: for an identity probe that the identity was said, for a general one that it was not.
    """

    kind: str
    intent: str
    language: str
    prompt: str
    base_answer: str
    answer: str
    base_passed: bool
    passed: bool
    similarity: float
    base_loss: float = 0.0
    loss: float = 0.0
    num_tokens: int = 0

    @property
    def changed(self) -> bool:
        return self.similarity < 1.0


@dataclass(frozen=True)
class ScoreLine:
    """One line of a scorecard, for tables. Values are shares (0.93), or None when nothing was measured.

    `base` and `tuned` are (value, low, high); `target` is what a good run reaches, `met` whether this one does.
    """

    name: str
    base: tuple[float, float, float] | None
    tuned: tuple[float, float, float] | None
    target: float | None
    higher_is_better: bool
    num_probes: int

    @property
    def met(self) -> bool | None:
        if self.tuned is None or self.target is None:
            return None
        return self.tuned[0] >= self.target if self.higher_is_better else self.tuned[0] <= self.target


def wilson(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """95 % interval of a rate; (0, 1) when nothing was counted. Sound near 0 and 1, where others are not."""
    if total == 0:
        return 0.0, 1.0
    rate, spread = hits / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if hits == 0 else low), (1.0 if hits == total else high)


def rate(hits: Iterable[bool]) -> dict[str, Any]:
    """{"hits", "total", "rate", "low", "high"}; rate is None when there was nothing to count."""
    marks = list(hits)
    low, high = wilson(sum(marks), len(marks))
    share = sum(marks) / len(marks) if marks else None
    return {"hits": sum(marks), "total": len(marks), "rate": share, "low": low, "high": high}


def identity_words(probes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names and makers that the identity probes expect: what must not turn up anywhere else."""
    expected = [probe["expected"] for probe in probes if probe["kind"] == "identity"]
    return list(dict.fromkeys(word for one in expected for word in (one["name"], one["maker"]) if word))


def leaks(answer: str, prompt: str, identity_words: Iterable[str]) -> bool:
    """Whether an answer says one of the words (name, maker) that its question did not say."""
    return any(mentions(answer, word) and not mentions(prompt, word) for word in identity_words)


def similarity(text: str, other: str) -> float:
    """1 for equal words in equal order, 0 for none in common; case and punctuation do not count."""
    return SequenceMatcher(None, words_of(text), words_of(other), autojunk=False).ratio()


def words_of(text: str) -> list[str]:
    """Lower-case words; Chinese characters count as words."""
    return _WORDS.findall(_HAN.sub(r" \1 ", text.casefold()))


def mark(
    probe: Mapping[str, Any],
    base_answer: str,
    answer: str,
    identity_words: Sequence[str],
    base_loss: float = 0.0,
    loss: float = 0.0,
    num_tokens: int = 0,
) -> MarkedAnswer:
    """Judge both answers to one probe."""
    prompt = question_of(probe)
    passes = _judge(probe, prompt, identity_words)
    return MarkedAnswer(
        kind=str(probe["kind"]),
        intent=str(probe.get("intent", "")),
        language=str(probe.get("language", "")),
        prompt=prompt,
        base_answer=base_answer,
        answer=answer,
        base_passed=passes(base_answer),
        passed=passes(answer),
        similarity=similarity(base_answer, answer),
        base_loss=base_loss,
        loss=loss,
        num_tokens=num_tokens,
    )


def question_of(probe: Mapping[str, Any]) -> str:
    """The chat that a probe asks, as one text: its turns, joined by line breaks when there are several."""
    return "\n".join(str(message["content"]) for message in probe["messages"])


def _judge(probe: Mapping[str, Any], prompt: str, identity_words: Sequence[str]) -> Callable[[str], bool]:
    if probe["kind"] == "identity":
        return lambda text: answers_identity(text, dict(probe))
    return lambda text: not leaks(text, prompt, identity_words)


def scorecard(answers: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """All scores of one subject as plain values, {"base", "tuned"} side by side.

    Without identity probes nobody knows which name must not be said, so leakage is not measured.
    """
    identity = [answer for answer in answers if answer.kind == "identity"]
    general = [answer for answer in answers if answer.kind == "general"]
    listened_to = general if identity else []
    sides = {"base": lambda each: each.base_passed, "tuned": lambda each: each.passed}
    return {
        "identity": {side: rate(passed(each) for each in identity) for side, passed in sides.items()},
        "leakage": {side: rate(not passed(each) for each in listened_to) for side, passed in sides.items()},
        "perplexity": {
            "base": _perplexity(general, lambda each: each.base_loss),
            "tuned": _perplexity(general, lambda each: each.loss),
        },
        "retention": retention(general),
        "changed": rate(answer.changed for answer in general),
        "similarity": fmean(answer.similarity for answer in general) if general else None,
        "identity_by_intent": _grouped(identity, lambda answer: answer.intent, lambda answer: answer.passed),
        "identity_by_language": _grouped(identity, lambda answer: answer.language, lambda answer: answer.passed),
        "leakage_by_intent": _grouped(listened_to, lambda answer: answer.intent, lambda answer: not answer.passed),
        "leakage_by_language": _grouped(listened_to, lambda answer: answer.language, lambda answer: not answer.passed),
    }


def retention(general: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """{"increase", "low", "high", "num_tokens"}: relative growth of perplexity on the base's own answers.

    The interval comes from drawing the probes again and again (a bootstrap with a fixed seed).
    """
    measured = [answer for answer in general if answer.num_tokens]
    if not measured:
        return {"increase": None, "low": None, "high": None, "num_tokens": 0}
    rng = random.Random(0)
    drawn = sorted(_increase(rng.choices(measured, k=len(measured))) for _ in range(NUM_RESAMPLES))
    return {
        "increase": _increase(measured),
        "low": drawn[round(0.025 * (NUM_RESAMPLES - 1))],
        "high": drawn[round(0.975 * (NUM_RESAMPLES - 1))],
        "num_tokens": sum(answer.num_tokens for answer in measured),
    }


def lines(scores: Mapping[str, Any]) -> list[ScoreLine]:
    """The scorecard's table, in the order in which it is read."""
    kept, identity, leakage = scores["retention"], scores["identity"], scores["leakage"]
    num_general = scores["changed"]["total"]
    increase = None if kept["increase"] is None else (kept["increase"], kept["low"], kept["high"])
    return [
        _line("identity", identity, IDENTITY_TARGET, True),
        _line("leakage", leakage, LEAKAGE_TARGET, False),
        ScoreLine("retention", increase and (0.0, 0.0, 0.0), increase, RETENTION_TARGET, False, num_general),
        ScoreLine("changed", None, _triple(scores["changed"]), None, False, num_general),
    ]


def detail(answer: MarkedAnswer) -> dict[str, Any]:
    """The marks of an answer, as they are stored beside it."""
    kept = ("base_passed", "passed", "similarity", "base_loss", "loss", "num_tokens")
    return {key: value for key, value in asdict(answer).items() if key in kept}


def _line(name: str, sides: Mapping[str, Any], target: float, higher_is_better: bool) -> ScoreLine:
    base, tuned = _triple(sides["base"]), _triple(sides["tuned"])
    return ScoreLine(name, base, tuned, target, higher_is_better, sides["tuned"]["total"])


def _perplexity(general: Sequence[MarkedAnswer], loss: Callable[[MarkedAnswer], float]) -> float | None:
    num_tokens = sum(answer.num_tokens for answer in general)
    return math.exp(min(sum(loss(answer) for answer in general) / num_tokens, 700.0)) if num_tokens else None


def _increase(answers: Sequence[MarkedAnswer]) -> float:
    num_tokens = sum(answer.num_tokens for answer in answers)
    difference = sum(answer.loss - answer.base_loss for answer in answers) / num_tokens
    return math.expm1(min(difference, 700.0))


def _grouped(
    answers: Sequence[MarkedAnswer],
    key: Callable[[MarkedAnswer], str],
    hit: Callable[[MarkedAnswer], bool],
) -> dict[str, dict[str, Any]]:
    names = sorted({key(answer) for answer in answers})
    return {name: rate(hit(answer) for answer in answers if key(answer) == name) for name in names}


def _triple(counted: Mapping[str, Any]) -> tuple[float, float, float] | None:
    return None if counted["rate"] is None else (counted["rate"], counted["low"], counted["high"])
