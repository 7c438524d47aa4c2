"""What the rounds of train.json say: medians, ratios to the best peer, time to a loss, how far losses differ."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "retune default"
BASE_LINE = "transformers best"
SAME_ORDER = ("trl default", BASE_LINE)  # that train the same rows in the same order, step by step
SMOOTH = 3  # steps whose mean loss is compared with the target
NEAR = 1.01  # a loss within 1 % of the target is at the target: runs differ by as much through rounding alone


@dataclass(frozen=True)
class Row:
    """One setting in one workload. Speeds in tokens per second, medians over rounds; `ours_times` is the studio's
    effective speed over this one's, round by round: median, lowest, highest."""

    name: str
    effective: float
    real: float
    trained: float
    computed: float
    per_cpu_second: float
    peak_bytes: int
    num_rounds: int
    target_seconds: float | None
    num_steps: int
    ours_times: tuple[float, float, float] | None


@dataclass(frozen=True)
class Verdict:
    """The promise of a workload: speed and memory beside the fastest setting of all peers, and the leanest."""

    best_peer: str
    times: tuple[float, float, float]
    target: float | None
    ours_bytes: int
    best_bytes: int
    leanest_peer: str
    leanest_bytes: int

    @property
    def is_fast(self) -> bool | None:
        return None if self.target is None else self.times[0] >= self.target

    @property
    def is_lean(self) -> bool:
        return self.ours_bytes < self.best_bytes


def rows(workload: dict[str, Any]) -> list[Row]:
    """Every setting that was measured, the fastest first."""
    names = dict.fromkeys(each["setting"] for each in workload["rounds"])
    target = target_loss(workload)
    found = [_row(workload, name, target) for name in names if _timed(workload, name)]
    return sorted(found, key=lambda row: -row.effective)


def verdict(workload: dict[str, Any]) -> Verdict | None:
    """None while the studio or every peer is still to be measured."""
    found = rows(workload)
    ours = next((row for row in found if row.name == OURS), None)
    peers = [row for row in found if row.name != OURS]
    if ours is None or not peers:
        return None
    fastest, leanest = peers[0], min(peers, key=lambda row: row.peak_bytes)
    assert fastest.ours_times is not None
    return Verdict(
        best_peer=fastest.name,
        times=fastest.ours_times,
        target=workload["target"],
        ours_bytes=ours.peak_bytes,
        best_bytes=fastest.peak_bytes,
        leanest_peer=leanest.name,
        leanest_bytes=leanest.peak_bytes,
    )


def losses(workload: dict[str, Any], name: str) -> list[float]:
    """Of every step, warm-up included."""
    return [loss for each in _rounds(workload, name) for loss in each["losses"]]


def target_loss(workload: dict[str, Any]) -> float | None:
    """The base line's mean loss over its last steps."""
    found = losses(workload, BASE_LINE)
    return sum(found[-SMOOTH:]) / SMOOTH if len(found) >= SMOOTH else None


def largest_difference(workload: dict[str, Any], one: str, other: str) -> tuple[float, int] | None:
    """(largest difference of a step's loss between two settings, steps compared); None where one is missing."""
    pairs = list(zip(losses(workload, one), losses(workload, other), strict=False))
    return (max(abs(left - right) for left, right in pairs), len(pairs)) if pairs else None


def _row(workload: dict[str, Any], name: str, target: float | None) -> Row:
    timed = _timed(workload, name)

    def speed(tokens: str, clock: str = "seconds") -> float:
        return median(each["tokens"][tokens] / each[clock] for each in timed)

    return Row(
        name=name,
        effective=speed("effective"),
        real=speed("real"),
        trained=speed("trained"),
        computed=speed("computed"),
        per_cpu_second=speed("effective", "cpu_seconds"),
        peak_bytes=max(each["peak_bytes"] for each in _rounds(workload, name)),
        num_rounds=len(timed),
        target_seconds=_seconds_to(workload, name, target),
        num_steps=len(losses(workload, name)),
        ours_times=None if name == OURS else _spread(_ratios(workload, name)),
    )


def _ratios(workload: dict[str, Any], name: str) -> list[float]:
    """The studio's effective tokens per second over another's, in the rounds that both took."""
    ours = {each["round"]: each for each in _timed(workload, OURS)}
    pairs = [(ours[each["round"]], each) for each in _timed(workload, name) if each["round"] in ours]
    return [_effective(one) / _effective(other) for one, other in pairs]


def _seconds_to(workload: dict[str, Any], name: str, target: float | None) -> float | None:
    """Seconds of training until the mean loss of a few steps is at the target, warm-up included; None if never."""
    if target is None:
        return None
    seconds, recent = 0.0, []
    for each in _rounds(workload, name):
        for loss in each["losses"]:
            seconds += each["seconds"] / len(each["losses"])
            recent = [*recent, loss][-SMOOTH:]
            if len(recent) == SMOOTH and sum(recent) / SMOOTH <= target * NEAR:
                return seconds
    return None


def _spread(values: Iterable[float]) -> tuple[float, float, float] | None:
    found = list(values)
    return (median(found), min(found), max(found)) if found else None


def _effective(each: dict[str, Any]) -> float:
    return float(each["tokens"]["effective"] / each["seconds"])


def _rounds(workload: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each for each in workload["rounds"] if each["setting"] == name]


def _timed(workload: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Without the warm-up."""
    return [each for each in _rounds(workload, name) if each["round"] > 0]
