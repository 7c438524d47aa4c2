"""The order in which rows of several sources are trained: shares or row counts, reproducible, resumable.

A source's portion is its share of the rows, relative to the other shares, or the number of its rows in every epoch,
or "all": each row once. The shares make an epoch of their own, in which each of their rows comes at least once; the
other portions come on top.
"""

import heapq
import math
import random
from array import array
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count, islice
from typing import Protocol

from studio.errors import DataError

MAX_EPOCH_ROWS = 20_000_000
MAX_VALID_ROWS = 256  # of one source; more would cost time and tell little


class RowCount(Protocol):
    """Rows of a source in every epoch, in place of a share."""

    @property
    def rows(self) -> int: ...


Portion = float | RowCount | str


def epoch_length(sizes: Mapping[str, int], sources: Mapping[str, Portion]) -> int:
    """Rows of an epoch: until every row of the sources with a share has come, with the shares held, and those of the
    others. Raises DataError."""
    return sum(_epoch_counts(sizes, sources).values())


def plan_epoch(
    sizes: Mapping[str, int], sources: Mapping[str, Portion], seed: int, epoch: int
) -> list[tuple[str, int]]:
    """The (source, row index from 0) of one epoch, in order.

    A source that is smaller than its share repeats in whole passes, each in a new order, so its rows come
    equally often, give or take one. Another source goes on where the epoch before stopped, so all its rows have
    their turn. Sources alternate evenly: every stretch of the epoch has the same mix, within a row or two per
    source. Raises DataError for an empty source, a share that is not above 0 or a count below 1.
    """
    return list(_epoch_rows(sizes, sources, seed, epoch))


def iterate(
    sizes: Mapping[str, int], sources: Mapping[str, Portion], seed: int, start: int = 0
) -> Iterator[tuple[str, int]]:
    """Yield epoch after epoch without end, from position `start` on: where a resumed run goes on."""
    first, skipped = divmod(start, epoch_length(sizes, sources))
    for epoch in count(first):
        yield from islice(_epoch_rows(sizes, sources, seed, epoch), skipped if epoch == first else 0, None)


def num_steps(epoch_rows: int, num_epochs: float, rows_per_step: int) -> int:
    """Optimizer steps that see `num_epochs` epochs, the last step filled up."""
    return max(1, math.ceil(num_epochs * epoch_rows / rows_per_step))


def num_valid_rows(num_rows: int, share: float) -> int:
    """Rows of a source that are kept out of training: at least one when there are ten, never all."""
    if share == 0 or num_rows < 2:
        return 0
    return min(max(round(num_rows * share), int(num_rows >= 10)), MAX_VALID_ROWS)


def _epoch_rows(
    sizes: Mapping[str, int], sources: Mapping[str, Portion], seed: int, epoch: int
) -> Iterator[tuple[str, int]]:
    """As `plan_epoch`, one after the other: an epoch may have millions."""
    counts = _epoch_counts(sizes, sources)
    rows = {}
    for name, number in counts.items():
        if isinstance(sources[name], int | float):
            rows[name] = _passes(f"{seed}-{epoch}-{name}", sizes[name])
        else:
            rows[name] = _passes(f"{seed}-{name}", sizes[name], start=epoch * number)
    for _, name in heapq.merge(*(_places(name, number) for name, number in counts.items())):
        yield name, next(rows[name])


def _places(name: str, total: int) -> Iterator[tuple[float, str]]:
    """Where the rows of a source stand in an epoch that lasts from 0 to 1."""
    return (((2 * k + 1) / (2 * total), name) for k in range(total))


def _epoch_counts(sizes: Mapping[str, int], sources: Mapping[str, Portion]) -> dict[str, int]:
    """Rows of each source in an epoch. Raises DataError."""
    _require_sound(sizes, sources)
    shares = {name: portion for name, portion in sources.items() if isinstance(portion, int | float)}
    counts = _share_counts(sizes, shares) if shares else {}
    counts |= {name: _own_rows(portion, sizes[name]) for name, portion in sources.items() if name not in shares}
    if (length := sum(counts.values())) > MAX_EPOCH_ROWS:
        raise DataError(
            f"One epoch of this mix would be {length:,} rows, because a large source has a small share.",
            f"At most {MAX_EPOCH_ROWS:,} are allowed: give it a larger share, or a number of rows.",
        )
    return dict(sorted(counts.items()))


def _own_rows(portion: Portion, size: int) -> int:
    return size if portion == "all" else portion.rows


def _require_sound(sizes: Mapping[str, int], sources: Mapping[str, Portion]) -> None:
    if not sizes or set(sizes) != set(sources):
        raise DataError(f"The sources are {sorted(sizes)}, the shares {sorted(sources)}.", "Name the same sources.")
    for name, portion in sources.items():
        if sizes[name] < 1:
            raise DataError(f"The source {name!r} has no rows.", "Add rows or take it out of the config.")
        if portion == "all":
            continue
        if not isinstance(portion, int | float):
            if portion.rows < 1:
                raise DataError(f"{name!r} gives {portion.rows} rows to an epoch.", "Allowed: 1 or more.")
        elif not (math.isfinite(portion) and portion > 0):
            raise DataError(f"The share of {name!r} is {portion}.", "Allowed: a number above 0.")


def _share_counts(sizes: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """Whole rows of each source with a share: the shares held, each of its rows at least once.

    The largest remainders are rounded up; the order in a config changes nothing.
    """
    exact = {name: Fraction(str(shares[name])) for name in sorted(shares)}
    whole = sum(exact.values())
    exact = {name: share / whole for name, share in exact.items()}
    length = max(math.ceil(sizes[name] / share) for name, share in exact.items())
    counts = {name: math.floor(share * length) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name] * length, name))
    for name in by_remainder[: length - sum(counts.values())]:
        counts[name] += 1
    return counts


def _passes(seed: str, size: int, start: int = 0) -> Iterator[int]:
    """All rows of a source in one order, then all in another, and so on, from position `start` on."""
    first, skipped = divmod(start, size)
    for number in count(first):
        rows = array("I", range(size))
        random.Random(f"{seed}-{number}").shuffle(rows)
        yield from rows[skipped:] if number == first else rows
