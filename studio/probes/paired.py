"""The same probes answered by two models: rates with their intervals, and what can be said of the difference.

Pairs are compared, not shares: a probe that both pass says nothing about the difference. Sources: Wilson 1927 for a
rate; McNemar 1947, exact, for whether a difference can be seen; Newcombe 1998 (Statistics in Medicine 17:2635, method
10) for the interval of a paired difference; Efron 1979, a bootstrap over probes, for means; Holm 1979 (Scandinavian
Journal of Statistics 6:65) for many looks.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist, fmean
from typing import Any, Literal, TypeVar

Z_95 = NormalDist().inv_cdf(0.975)
SEEN_BELOW = 0.05
NUM_RESAMPLES = 1000
Seen = Literal["more", "fewer", "none"]
Each = TypeVar("Each")
Interval = tuple[float, float, float]  # value, low, high


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


def sides(pairs: Iterable[tuple[bool, bool]]) -> dict[str, Any]:
    """Of (base, tuned) marks of each probe: {"base": rate, "tuned": rate, "difference": difference}."""
    marks = list(pairs)
    return {
        "base": rate(base for base, _ in marks),
        "tuned": rate(tuned for _, tuned in marks),
        "difference": difference(marks),
    }


def difference(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Tuned minus base of (base, tuned) marks, as plain values:

    value, low, high   the difference of the shares and its 95 % interval; value is None for no pairs
    gained, lost       probes that the tuned model alone hits, and the base alone
    p                  McNemar's exact p
    seen               "more" or "fewer" hits where both p and the interval say so, else "none"
    """
    total, gained = len(pairs), sum(tuned and not base for base, tuned in pairs)
    both, lost = sum(base and tuned for base, tuned in pairs), sum(base and not tuned for base, tuned in pairs)
    low, high = paired_interval(both, gained, lost, total - both - gained - lost)
    p = mcnemar(gained, lost)
    value = (gained - lost) / total if total else None
    seen: Seen = "none"
    if value is not None and p < SEEN_BELOW and not low <= 0 <= high:
        seen = "more" if value > 0 else "fewer"
    return {
        "value": value, "low": low, "high": high, "gained": gained, "lost": lost, "p": p, "total": total, "seen": seen
    }  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p for the discordant pairs: how often a fair coin falls at least as unevenly."""
    number = gained + lost
    tail = sum(math.comb(number, k) for k in range(min(gained, lost) + 1)) / 2**number
    return min(1.0, 2 * tail)


def share_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Share of `first` minus share of `second`, two marks of each of the same questions, with its 95 % interval; zeros
    for no questions."""
    if not first:
        return 0.0, 0.0, 0.0
    found = difference(list(zip(second, first, strict=True)))
    return found["value"], found["low"], found["high"]


def holm(chances: Sequence[float]) -> list[float]:
    """Each chance corrected for all that were looked at together, in their order: where none is more than chance, one
    is below a level in less than that share of cases, however they hang together."""
    corrected, highest = [0.0] * len(chances), 0.0
    for place, index in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        highest = max(highest, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = highest
    return corrected


def at_least(hits: int, total: int, share: float) -> float:
    """How often so many hits or more come about where each of `total` probes is hit with this chance: exact, 0 to 1."""
    if not 0 < share < 1:
        return float(hits == 0 or share >= 1)
    among = math.lgamma(total + 1)
    terms = (
        among - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * math.log(share) + (total - k) * math.log1p(-share)
        for k in range(hits, total + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def paired_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / total; (-1, 1) when nothing was counted."""
    total = both + gained + lost + neither
    if total == 0:
        return -1.0, 1.0
    first, second = (both + gained) / total, (both + lost) / total
    (low1, high1), (low2, high2) = wilson(both + gained, total), wilson(both + lost, total)
    phi = _correlation(both, gained, lost, neither)

    def reach(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * two + two * two))

    value = first - second
    return value - reach(first - low1, high2 - second), value + reach(high1 - first, second - low2)


def mean(items: Sequence[Each], of: Callable[[Sequence[Each]], float]) -> dict[str, float]:
    """{"value", "low", "high"} of a statistic over probes; the interval by drawing them again, with a fixed seed."""
    rng = random.Random(0)
    drawn = sorted(of(rng.choices(items, k=len(items))) for _ in range(NUM_RESAMPLES))
    return {
        "value": of(items),
        "low": drawn[round(0.025 * (NUM_RESAMPLES - 1))],
        "high": drawn[round(0.975 * (NUM_RESAMPLES - 1))],
    }


def average(values: Iterable[float]) -> float | None:
    """None for no values."""
    found = list(values)
    return fmean(found) if found else None


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Phi of the pairs with Newcombe's correction, which moves a positive one towards 0."""
    total = both + gained + lost + neither
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = both * neither - gained * lost
    if cross > 0:
        cross = max(cross - total / 2, 0)
    return cross / math.sqrt(product) if product else 0.0
