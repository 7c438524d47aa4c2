"""Whether training spoilt a model: the verdict on checkpoints, from their scorecards alone.

The rule and its reasons: docs/decisions/0011-which-checkpoint.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

from studio import scores
from studio.probes import paired
from studio.probes.paired import Interval
from studio.scores import LEAKAGE_TARGET, RETENTION_TARGET

Verdict = Literal["overfitted", "unclear", "sound", "unmeasured"]


@dataclass(frozen=True)
class Sign:
    """One thing that training may have spoilt: its share with its 95 % interval, and the most that is wanted, `limit`
    (or what the base does by itself, where that is more).

    `chance`: how often as much is measured where training did no harm, alone and `corrected` for all that was looked
    at with it: the signs of the `looks` checkpoints. `base_hits`: leaks of the base on the same `total` questions.
    """

    name: Literal["leakage", "retention"]
    value: Interval
    limit: float
    chance: float
    corrected: float = 1.0
    looks: int = 1
    hits: int = 0
    base_hits: int = 0
    total: int = 0

    @property
    def is_above(self) -> bool:
        return self.value[0] > self.limit

    @property
    def sure(self) -> bool:
        """The whole interval lies above the limit, and chance does not explain it."""
        return self.value[1] > self.limit and self.corrected < paired.SEEN_BELOW

    @property
    def sentence(self) -> str:
        if self.sure or self.looks == 1:
            return self._measured
        return f"{self._measured} It is one of {self.looks} checkpoints that were scored."

    @property
    def _measured(self) -> str:
        value, low, high = (f"{100 * each:.1f} %" for each in self.value)
        if self.name == "retention":
            if self.sure:
                return f"It forgot: perplexity on what it knew grew by {value} (95 %: {low} to {high})."
            return f"Perhaps it forgot: perplexity on what it knew grew by {value}, but 95 % is {low} to {high}."
        if self.sure:
            return (
                f"It says who it is in {self.hits} of {self.total} unrelated answers: {value} (95 %: {low} to {high}); "
                f"the base in {self.base_hits}."
            )
        return (
            f"{self.hits} of {self.total} unrelated answers say who it is, {self.base_hits} of the base's. That may be "
            f"chance: 95 % is {low} to {high}, and training that does no harm gets there in {100 * self.chance:.1f} % "
            "of such tests."
        )


@dataclass(frozen=True)
class Overfit:
    """Whether a checkpoint is overfitted, by all `signs` that were measured of it."""

    verdict: Verdict
    signs: tuple[Sign, ...] = ()

    @property
    def suspicions(self) -> list[Sign]:
        """Signs above what is wanted, those that are sure first."""
        return sorted((sign for sign in self.signs if sign.is_above), key=lambda sign: not sign.sure)


def overfitting(values: Mapping[str, Any]) -> Overfit:
    """The verdict on one scorecard (`scores.scorecard`) that is looked at by itself."""
    return judged([signs(values)])[0]


def judged(checkpoints: Sequence[Sequence[Sign]]) -> list[Overfit]:
    """The verdict on each of a run's checkpoints, from the signs of all that were looked through (Holm)."""
    corrected = iter(paired.holm([sign.chance for found in checkpoints for sign in found]))
    looks = len(checkpoints)
    return [
        _verdict([replace(sign, corrected=next(corrected), looks=looks) for sign in found]) for found in checkpoints
    ]


def signs(values: Mapping[str, Any]) -> tuple[Sign, ...]:
    """What was measured of a scorecard's leakage and retention, be it good or bad."""
    lines = {line.name: line for line in scores.lines(values)}
    leakage, growth = lines["leakage"].tuned, lines["retention"].tuned
    found = []
    if leakage:
        found.append(_leakage(leakage, values["leakage"]))
    if growth:
        found.append(Sign("retention", growth, RETENTION_TARGET, _beyond(growth, lines["retention"].num_probes)))
    return tuple(found)


def _leakage(measured: Interval, sides: Mapping[str, Any]) -> Sign:
    """Harm is both: more leaks than are wanted, and more than the base's on the same questions."""
    hits, total, base = sides["tuned"]["hits"], sides["tuned"]["total"], sides["base"]
    # Scorecards of before suites know no pairs: then no question counts as leaked by both.
    pairs = sides.get("difference") or {"gained": hits, "lost": base["hits"]}
    limit = max(LEAKAGE_TARGET, base["rate"] or 0.0)
    too_many = paired.at_least(hits, total, limit)
    more_than_base = paired.at_least(pairs["gained"], pairs["gained"] + pairs["lost"], 0.5)
    chance = max(too_many, more_than_base)
    return Sign("leakage", measured, limit, chance, hits=hits, base_hits=base["hits"], total=total)


def _beyond(measured: Interval, num_probes: int) -> float:
    """How often perplexity is measured to have grown so much where it grows by the limit: by the normal curve of its
    interval, and no less than so many fair coins on one side; of a few probes a bootstrap's interval is too narrow."""
    value, low, _ = measured
    spread = (value - low) / paired.Z_95
    by_curve = NormalDist().cdf((RETENTION_TARGET - value) / spread) if spread > 0 else float(value <= RETENTION_TARGET)
    return max(by_curve, 0.5**num_probes)


def _verdict(measured: Sequence[Sign]) -> Overfit:
    if not measured:
        return Overfit("unmeasured")
    is_sure, is_suspect = any(sign.sure for sign in measured), any(sign.is_above for sign in measured)
    return Overfit("overfitted" if is_sure else "unclear" if is_suspect else "sound", tuple(measured))
