"""The order in which rows of several sources are trained: fixed shares, reproducible, resumable."""

import math
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count, islice

from studio.errors import DataError

MAX_EPOCH_ROWS = 20_000_000
MAX_VALID_ROWS = 256  # of one source; more would cost time and tell little


def epoch_length(sizes: Mapping[str, int], shares: Mapping[str, float]) -> int:
    """Rows until every row of every source has come at least once, with the shares held. Raises DataError."""
    exact = _normalised(sizes, shares)
    length = max(math.ceil(sizes[name] / share) for name, share in exact.items())
    if length > MAX_EPOCH_ROWS:
        raise DataError(
            f"One epoch of this mix would be {length:,} rows, because a large source has a small share.",
            f"At most {MAX_EPOCH_ROWS:,} are allowed: give it a larger share, or use fewer of its rows.",
        )
    return length


def num_steps(epoch_rows: int, num_epochs: float, rows_per_step: int) -> int:
    """Optimizer steps that see `num_epochs` epochs, the last step filled up."""
    return max(1, math.ceil(num_epochs * epoch_rows / rows_per_step))


def num_valid_rows(num_rows: int, share: float) -> int:
    """Rows of a source that are kept out of training: at least one when there are ten, never all."""
    if share == 0 or num_rows < 2:
        return 0
    return min(max(round(num_rows * share), int(num_rows >= 10)), MAX_VALID_ROWS)


def plan_epoch(sizes: Mapping[str, int], shares: Mapping[str, float], seed: int, epoch: int) -> list[tuple[str, int]]:
    """The (source, row index from 0) of one epoch, in order.

    A source that is smaller than its share repeats in whole passes, each in a new order, so its rows come
    equally often, give or take one. Sources alternate evenly: every stretch of the epoch has the shares
    within a row or two per source. Raises DataError for an empty source or a share that is not above 0.
    """
    exact = _normalised(sizes, shares)
    counts = _counts(exact, epoch_length(sizes, shares))
    places = sorted(((2 * k + 1) / (2 * total), name) for name, total in counts.items() for k in range(total))
    rows = {name: _passes(name, sizes[name], seed, epoch) for name in counts}
    return [(name, next(rows[name])) for _, name in places]


def iterate(
    sizes: Mapping[str, int], shares: Mapping[str, float], seed: int, start: int = 0
) -> Iterator[tuple[str, int]]:
    """Yield epoch after epoch without end, from position `start` on: where a resumed run goes on."""
    first, skipped = divmod(start, epoch_length(sizes, shares))
    for epoch in count(first):
        yield from islice(plan_epoch(sizes, shares, seed, epoch), skipped if epoch == first else 0, None)


def rows_for(
    sizes: Mapping[str, int], shares: Mapping[str, float], seed: int, num_rows: int, start: int = 0
) -> list[tuple[str, int]]:
    """The `num_rows` rows that come from position `start` on."""
    return list(islice(iterate(sizes, shares, seed, start), num_rows))


def _normalised(sizes: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, Fraction]:
    """Shares that sum to exactly 1, in alphabetical order: the order in a config changes nothing."""
    if not sizes or set(sizes) != set(shares):
        raise DataError(f"The sources are {sorted(sizes)}, the shares {sorted(shares)}.", "Name the same sources.")
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"The source {name!r} has no rows.", "Add rows or take it out of the config.")
        if not (math.isfinite(shares[name]) and shares[name] > 0):
            raise DataError(f"The share of {name!r} is {shares[name]}.", "Allowed: a number above 0.")
    exact = {name: Fraction(str(shares[name])) for name in sorted(shares)}
    total = sum(exact.values())
    return {name: share / total for name, share in exact.items()}


def _counts(exact: Mapping[str, Fraction], length: int) -> dict[str, int]:
    """Whole rows per source that sum to `length`; the largest remainders are rounded up."""
    counts = {name: math.floor(share * length) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name] * length, name))
    for name in by_remainder[: length - sum(counts.values())]:
        counts[name] += 1
    return counts


def _passes(name: str, size: int, seed: int, epoch: int) -> Iterator[int]:
    """All rows of a source in one order, then all in another, and so on."""
    for number in count():
        rows = list(range(size))
        random.Random(f"{seed}-{epoch}-{name}-{number}").shuffle(rows)
        yield from rows
