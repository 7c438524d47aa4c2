"""Scores of a tuned model beside its base, from marked answers: plain arithmetic, no model needed.

identity    share of questions about the assistant that are answered with its new name or maker
leakage     share of general questions whose answer says that name or maker though nobody asked
retention   how much worse the tuned model predicts the base's own answers to general questions (perplexity), and how
            far its predictions there are from the base's (divergence)

An evaluation stores what `scorecard` returns; its docstring is the form that pages, reports and recommendations read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from studio.probes import paired
from studio.probes.assertions import Mark, Said
from studio.probes.judge import Judge
from studio.probes.likeness import loops, similarity
from studio.probes.suite import Probe

IDENTITY_TARGET, LEAKAGE_TARGET, RETENTION_TARGET = 0.90, 0.05, 0.10
LEAK = "not-mentions"


@dataclass(frozen=True)
class Likelihood:
    """How well both models predict the reference of a probe: sums over its `num_tokens` tokens, in nats.

    `divergence` is Kullback and Leibler's, from the base to the tuned model; None where it was not measured.
    """

    base_loss: float = 0.0
    loss: float = 0.0
    num_tokens: int = 0
    divergence: float | None = None


@dataclass(frozen=True)
class MarkedAnswer:
    """One probe answered by base and tuned model. `loss` sums over the `num_tokens` of the base's reference answer.

    `passed` means that all assertions of the probe hold; `judged` is False where it has none that could be decided.
    `leaked` says whether something was said that must not be, None for a probe that forbids nothing.
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
    divergence: float | None = None
    group: str = ""
    judged: bool = True
    leaked: bool | None = None
    base_leaked: bool | None = None
    finished: bool = True
    base_finished: bool = True
    marks: tuple[Mark, ...] = ()
    base_marks: tuple[Mark, ...] = ()

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

    @property
    def sure(self) -> bool:
        """Whether the whole interval lies on one side of the target, so that chance alone does not explain it."""
        if self.tuned is None or self.target is None:
            return False
        return self.target <= self.tuned[1] or self.tuned[2] <= self.target


def mark(
    probe: Probe, base: Said, tuned: Said, likelihood: Likelihood | None = None, judge: Judge | None = None
) -> MarkedAnswer:
    """Judge both answers to one probe; rubrics need a `judge`."""
    likelihood = likelihood or Likelihood()
    base_marks, marks = probe.marks(base, judge), probe.marks(tuned, judge)
    return MarkedAnswer(
        kind=probe.kind,
        intent=probe.intent,
        language=probe.language,
        prompt=probe.prompt,
        base_answer=base.text,
        answer=tuned.text,
        base_passed=all(each.passed for each in base_marks),
        passed=all(each.passed for each in marks),
        similarity=similarity(base.text, tuned.text),
        group=probe.group,
        judged=bool(marks) and _decided(base_marks) and _decided(marks),
        leaked=_leaked(probe, marks),
        base_leaked=_leaked(probe, base_marks),
        finished=tuned.finished,
        base_finished=base.finished,
        marks=tuple(marks),
        base_marks=tuple(base_marks),
        **asdict(likelihood),
    )


def _decided(marks: Sequence[Mark]) -> bool:
    """One that failed decides; else all must be known."""
    return any(each.passed is False for each in marks) or all(each.passed is not None for each in marks)


def _leaked(probe: Probe, marks: Sequence[Mark]) -> bool | None:
    forbidding = [each for each in marks if each.type == LEAK] if probe.kind == "general" else []
    return any(each.passed is False for each in forbidding) if forbidding else None


def scorecard(answers: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """All scores of one subject as plain values. A pair of sides is {"base": rate, "tuned": rate, "difference":
    difference}, with rates and differences as `studio.probes.paired` makes them.

    identity, leakage        sides over the probes of that kind (hits of leakage are leaks)
    groups                   group of the suite -> sides of probes passed, with its "kind"; only what could be judged
    all                      sides of all judged probes
    ends, loops              sides: answers that ended by themselves, that repeat themselves
    perplexity               {"base", "tuned"} on the references, None when nothing was measured
    retention                {"increase", "low", "high", "num_tokens"}: relative growth of perplexity
    divergence               {"value", "low", "high", "num_tokens"}: nats a token from the base, None when not measured
    changed, similarity      rate of general answers in other words than the base's, and their mean likeness
    identity_by_intent, identity_by_language, leakage_by_intent, leakage_by_language     name -> rate of the tuned model

    Where nothing was counted, rates and values are None. Scorecards stored before suites were have no groups, all,
    ends, loops, divergence and differences.
    """
    identity = [answer for answer in answers if answer.kind == "identity" and answer.judged]
    general = [answer for answer in answers if answer.kind == "general"]
    listened_to = [answer for answer in general if answer.leaked is not None]
    measured = [answer for answer in answers if answer.num_tokens]
    return {
        "identity": paired.sides((each.base_passed, each.passed) for each in identity),
        "leakage": paired.sides((bool(each.base_leaked), bool(each.leaked)) for each in listened_to),
        "groups": _groups(answers),
        "all": paired.sides((each.base_passed, each.passed) for each in answers if each.judged),
        "ends": paired.sides((each.base_finished, each.finished) for each in answers),
        "loops": paired.sides((loops(each.base_answer), loops(each.answer)) for each in answers),
        "perplexity": {
            "base": _perplexity(measured, lambda each: each.base_loss),
            "tuned": _perplexity(measured, lambda each: each.loss),
        },
        "retention": retention(measured),
        "divergence": divergence(measured),
        "changed": paired.rate(answer.changed for answer in general),
        "similarity": paired.average(answer.similarity for answer in general),
        "identity_by_intent": _rates(identity, lambda each: each.intent, lambda each: each.passed),
        "identity_by_language": _rates(identity, lambda each: each.language, lambda each: each.passed),
        "leakage_by_intent": _rates(listened_to, lambda each: each.intent, lambda each: bool(each.leaked)),
        "leakage_by_language": _rates(listened_to, lambda each: each.language, lambda each: bool(each.leaked)),
    }


def retention(measured: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """{"increase", "low", "high", "num_tokens"}: relative growth of perplexity on the references."""
    if not measured:
        return {"increase": None, "low": None, "high": None, "num_tokens": 0}
    found = paired.mean(measured, _increase)
    num_tokens = sum(answer.num_tokens for answer in measured)
    return {"increase": found["value"], "low": found["low"], "high": found["high"], "num_tokens": num_tokens}


def divergence(measured: Sequence[MarkedAnswer]) -> dict[str, Any]:
    """{"value", "low", "high", "num_tokens"}: nats a token from the base's predictions to the tuned model's."""
    known = [answer for answer in measured if answer.divergence is not None]
    if not known:
        return {"value": None, "low": None, "high": None, "num_tokens": 0}
    return paired.mean(known, _divergence) | {"num_tokens": sum(answer.num_tokens for answer in known)}


def lines(scores: Mapping[str, Any]) -> list[ScoreLine]:
    """The scorecard's table, in the order in which it is read."""
    kept, identity, leakage = scores["retention"], scores["identity"], scores["leakage"]
    num_general = scores["changed"]["total"]
    increase = None if kept["increase"] is None else (kept["increase"], kept["low"], kept["high"])
    return [
        _line("identity", identity, IDENTITY_TARGET, True),
        _line("leakage", leakage, LEAKAGE_TARGET, False),
        ScoreLine("retention", increase and (0.0, 0.0, 0.0), increase, RETENTION_TARGET, False, num_general),
        ScoreLine("changed", None, triple(scores["changed"]), None, False, num_general),
    ]


def in_words(difference: Mapping[str, Any]) -> str:
    """What a difference of probes passed allows to say, and no more (`told` has it in other languages)."""
    total, gained, lost = difference["total"], difference["gained"], difference["lost"]
    if not total:
        return "Nothing could be compared."
    if difference["seen"] == "none":
        return f"No difference can be seen with {total} probes ({gained} won, {lost} lost)."
    low, high = sorted(abs(100 * difference[end]) for end in ("low", "high"))
    word = "better" if difference["seen"] == "more" else "worse"
    return f"Passes {low:.0f} to {high:.0f} points {word} than the base ({gained} won, {lost} lost of {total})."


def triple(counted: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(rate, low, high) of a rate; None when nothing was counted."""
    return None if counted["rate"] is None else (counted["rate"], counted["low"], counted["high"])


def detail(answer: MarkedAnswer) -> dict[str, Any]:
    """The marks of an answer, as they are stored beside it: what is in no column of its own."""
    in_columns = ("kind", "intent", "language", "prompt", "base_answer", "answer")
    return {key: value for key, value in asdict(answer).items() if key not in in_columns}


def growth(loss_difference: float) -> float:
    """Relative growth of perplexity when the mean loss grows by so much, in nats a token: 0.1 for 10 %."""
    return math.expm1(min(loss_difference, 700.0))


def _groups(answers: Sequence[MarkedAnswer]) -> dict[str, Any]:
    judged = [answer for answer in answers if answer.judged]
    names = dict.fromkeys(answer.group for answer in judged)
    members = {name: [answer for answer in judged if answer.group == name] for name in names}
    return {
        name: {"kind": found[0].kind} | paired.sides((each.base_passed, each.passed) for each in found)
        for name, found in members.items()
    }


def _line(name: str, sides: Mapping[str, Any], target: float, higher_is_better: bool) -> ScoreLine:
    base, tuned = triple(sides["base"]), triple(sides["tuned"])
    return ScoreLine(name, base, tuned, target, higher_is_better, sides["tuned"]["total"])


def _perplexity(measured: Sequence[MarkedAnswer], loss: Callable[[MarkedAnswer], float]) -> float | None:
    num_tokens = sum(answer.num_tokens for answer in measured)
    return math.exp(min(sum(loss(answer) for answer in measured) / num_tokens, 700.0)) if num_tokens else None


def _increase(answers: Sequence[MarkedAnswer]) -> float:
    num_tokens = sum(answer.num_tokens for answer in answers)
    return growth(sum(answer.loss - answer.base_loss for answer in answers) / num_tokens)


def _divergence(answers: Sequence[MarkedAnswer]) -> float:
    return sum(answer.divergence or 0.0 for answer in answers) / sum(answer.num_tokens for answer in answers)


def _rates(
    answers: Sequence[MarkedAnswer],
    key: Callable[[MarkedAnswer], str],
    hit: Callable[[MarkedAnswer], bool],
) -> dict[str, dict[str, Any]]:
    names = sorted({key(answer) for answer in answers})
    return {name: paired.rate(hit(answer) for answer in answers if key(answer) == name) for name in names}
