"""Which checkpoint to take: identity against what it cost, for all that answered the same held-out questions.

Score of a checkpoint: share of identity questions answered with the identity, minus the share of unrelated answers
that say it too (what `record.best_by: probe_score` watches on the way). Differences are paired, for every checkpoint
answered the same questions: the intervals of the two shares' differences (`probes.paired`), their variances added.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from studio import overfit, scores
from studio.overfit import Overfit
from studio.probes import paired
from studio.probes.paired import Interval
from studio.scores import IDENTITY_TARGET, LEAKAGE_TARGET, RETENTION_TARGET
from studio.store.evaluations import Answer, Evaluation

LEARNT = 0.5


@dataclass(frozen=True)
class Candidate:
    """A scored checkpoint. `identity`, `leakage` and `growth` (of perplexity) are (value, low, high), None when not
    measured; `said` and `leaked` hold the mark of every identity and every general question, in their order.

    `overfit` is the verdict on it alone, and in a Recommendation that on one of all its run's.
    """

    run_id: str
    step: int
    evaluation_id: str
    identity: Interval | None
    leakage: Interval | None
    growth: Interval | None
    overfit: Overfit
    said: tuple[bool, ...]
    leaked: tuple[bool, ...]
    asked: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Identity minus leakage, -1 to 1."""
        return _share(self.said) - _share(self.leaked)

    @property
    def reached(self) -> frozenset[str]:
        """Names of the targets that it meets."""
        met = {
            "identity": self.identity is not None and self.identity[0] >= IDENTITY_TARGET,
            "leakage": self.leakage is not None and self.leakage[0] <= LEAKAGE_TARGET,
            "retention": self.growth is not None and self.growth[0] <= RETENTION_TARGET,
        }
        return frozenset(name for name, is_met in met.items() if is_met)

    @property
    def num_questions(self) -> int:
        return len(self.said) + len(self.leaked)


@dataclass(frozen=True)
class Recommendation:
    """`chosen` is None when none can be recommended; `reason` says why in one sentence.

    `behind` is how far it scores behind the best, in shares with a 95 % interval. `left_out` counts scorecards of
    checkpoints that answered other questions, which cannot be compared with these.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    best: Candidate | None
    behind: Interval | None
    reason: str
    left_out: int = 0

    @property
    def caveat(self) -> str:
        """What the recommended one still lacks, or may have lost, in a sentence; "" for nothing."""
        if self.chosen is None:
            return ""
        if "identity" not in self.chosen.reached:
            target = f"{100 * IDENTITY_TARGET:.0f} % identity"
            return f"It is the best there is, and misses the target: {target}. Train longer."
        return next((sign.sentence for sign in self.chosen.overfit.suspicions), "")

    @property
    def runs(self) -> list["RunVerdict"]:
        """The verdict on each run, by its scored checkpoints."""
        by_run: dict[str, list[Candidate]] = {}
        for each in self.candidates:
            by_run.setdefault(each.run_id, []).append(each)
        return [RunVerdict(run_id, tuple(own)) for run_id, own in by_run.items()]


@dataclass(frozen=True)
class RunVerdict:
    """What a run came to: overfitted is the one whose last scored checkpoint is. One on the way that was is no more
    than a reason not to take that one."""

    run_id: str
    scored: tuple[Candidate, ...]

    @property
    def last(self) -> Candidate:
        return self.scored[-1]

    @property
    def spoilt(self) -> list[Candidate]:
        return [each for each in self.scored if each.overfit.verdict == "overfitted"]

    @property
    def is_overfitted(self) -> bool:
        return self.last in self.spoilt

    @property
    def sentence(self) -> str:
        """What is to be said of it; empty where nothing was found."""
        name, step, bad, number = self.run_id, self.last.step, len(self.spoilt), len(self.scored)
        if self.is_overfitted and number == 1:
            return f"{name} is overfitted at step {step}, its only scored checkpoint."
        if self.is_overfitted:
            return f"{name} is overfitted at its end, step {step}: {bad} of {number} scored checkpoints are."
        if bad:
            steps = ", ".join(str(each.step) for each in self.spoilt)
            return f"{name} was overfitted on its way, at step {steps}; at the last scored one, {step}, it is not."
        return ""

    @property
    def told(self) -> str:
        """The sentence, and the figures that go with it."""
        return " ".join([self.sentence, *self.figures]).strip()

    @property
    def figures(self) -> list[str]:
        """What its last scored checkpoint does, a sentence for each thing that is sure."""
        return [sign.sentence for sign in self.last.overfit.suspicions if sign.sure]


def candidate(evaluation: Evaluation, answers: Sequence[Answer]) -> Candidate:
    """A checkpoint's scorecard with its answers, as something to choose from."""
    lines = {line.name: line.tuned for line in scores.lines(evaluation.scores)}
    identity = [answer for answer in answers if answer.kind == "identity"]
    general = [answer for answer in answers if answer.leaked is not None]
    return Candidate(
        run_id=evaluation.run_id,
        step=evaluation.step,
        evaluation_id=evaluation.id,
        identity=lines["identity"],
        leakage=lines["leakage"],
        growth=lines["retention"],
        overfit=overfit.overfitting(evaluation.scores),
        said=tuple(bool(answer.detail.get("passed")) for answer in identity),
        leaked=tuple(bool(answer.leaked) for answer in general) if identity else (),
        asked=tuple(answer.prompt for answer in (*identity, *general)),
    )


def recommend(candidates: Iterable[Candidate]) -> Recommendation:
    """The earliest checkpoint that these questions cannot tell from the best one and that meets each target it meets.

    Overfitted ones are not chosen. Few questions tell little apart, so the targets keep a half-learnt one from passing.
    `candidates` come newest first: of several scorecards of a checkpoint on the same questions the first counts, and
    of several sets of questions the one that most checkpoints answered (then the larger one, then the newer one).
    """
    asked_alike, left_out = _comparable(list(candidates))
    found = _judged(asked_alike)
    if not found:
        return Recommendation((), None, None, None, "No checkpoint is scored yet.", left_out)
    if not found[0].said or not found[0].leaked:
        reason = "The held-out questions ask for no identity, or for nothing else: there is nothing to weigh."
        return Recommendation(found, None, None, None, reason, left_out)
    sound = [each for each in found if each.overfit.verdict != "overfitted"]
    if not sound:
        return Recommendation(found, None, None, None, _none_is_sound(found), left_out)
    best = max(sound, key=lambda each: (each.score, -each.step))
    if _share(best.said) < LEARNT:
        return Recommendation(found, None, best, None, _none_learnt(best), left_out)
    chosen = next(each for each in sound if behind(each, best)[1] <= 0 and each.reached >= best.reached)
    lag = behind(chosen, best)
    return Recommendation(found, chosen, best, lag, _reason(chosen, best, lag, found), left_out)


def behind(one: Candidate, best: Candidate) -> Interval:
    """How far a score is behind that of another checkpoint on the same questions: (value, low, high), shares."""
    identity, leakage = paired.share_difference(best.said, one.said), paired.share_difference(one.leaked, best.leaked)
    value = identity[0] + leakage[0]
    low = value - math.hypot(identity[0] - identity[1], leakage[0] - leakage[1])
    high = value + math.hypot(identity[2] - identity[0], leakage[2] - leakage[0])
    return value, low, high


def pareto(candidates: Iterable[Candidate], cost: Callable[[Candidate], float | None]) -> list[Candidate]:
    """Those that no other beats in identity without costing more (leakage, growth), from the cheapest on."""
    measured = [each for each in candidates if each.identity is not None and cost(each) is not None]
    measured.sort(key=lambda each: (cost(each), -_value(each.identity), each.step))
    front: list[Candidate] = []
    for each in measured:
        if not front or _value(each.identity) > _value(front[-1].identity):
            front.append(each)
    return front


def _comparable(candidates: Sequence[Candidate]) -> tuple[tuple[Candidate, ...], int]:
    """One candidate a checkpoint, all asked the same questions, earliest first; how many others there are."""
    by_questions: dict[tuple[str, ...], dict[tuple[str, int], Candidate]] = {}
    for each in candidates:
        by_questions.setdefault(each.asked, {}).setdefault((each.run_id, each.step), each)
    if not by_questions:
        return (), 0
    group = max(by_questions.values(), key=lambda group: (len(group), next(iter(group.values())).num_questions))
    others = {key for other in by_questions.values() for key in other} - set(group)
    return tuple(sorted(group.values(), key=lambda each: (each.step, each.run_id))), len(others)


def _judged(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """With the verdict on each as one of its run's, in their order."""
    verdicts = {}
    for run_id in {each.run_id for each in found}:
        own = [each for each in found if each.run_id == run_id]
        judged = overfit.judged([each.overfit.signs for each in own])
        verdicts |= {each.evaluation_id: verdict for each, verdict in zip(own, judged, strict=True)}
    return tuple(replace(each, overfit=verdicts[each.evaluation_id]) for each in found)


def _reason(chosen: Candidate, best: Candidate, lag: Interval, found: Sequence[Candidate]) -> str:
    one, figures = chosen, _figures(chosen)
    if len(found) == 1:
        return f"{one.run_id} step {one.step} ({figures}) is the only checkpoint that was scored."
    if one is not best:
        value, low, high = (f"{100 * each:.1f}" for each in lag)
        return (
            f"{one.run_id} step {one.step} ({figures}) is the earliest that meets the targets of the best, "
            f"{best.run_id} step {best.step}, and that {one.num_questions} questions cannot tell from it: "
            f"{value} points behind, 95 %: {low} to {high}."
        )
    if one is found[0]:
        return f"{one.run_id} step {one.step} ({figures}) scores best, and none is earlier."
    return (
        f"{one.run_id} step {one.step} ({figures}) scores best; each before it is worse by more than chance, misses a "
        "target that this one meets, or is overfitted."
    )


def _none_is_sound(found: Sequence[Candidate]) -> str:
    least = max(found, key=lambda each: each.score)
    return (
        f"None can be recommended: all are overfitted, {least.run_id} step {least.step} the least ({_figures(least)})."
    )


def _none_learnt(best: Candidate) -> str:
    return (
        f"None can be recommended: none learnt who it is; {best.run_id} step {best.step} comes nearest "
        f"({_figures(best)})."
    )


def _figures(one: Candidate) -> str:
    return f"identity {_percent(one.identity)}, leakage {_percent(one.leakage)}"


def _percent(value: Interval | None) -> str:
    return "–" if value is None else f"{100 * value[0]:.1f} %"


def _value(interval: Interval | None) -> float:
    return interval[0] if interval else 0.0


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks) if marks else 0.0
