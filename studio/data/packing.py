"""Decides which examples share a sequence and which sequences share a micro-batch. Arithmetic on lengths."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studio.errors import DataError

PACKS = ("none", "sequence")
MicroBatch = list[list[int]]


@dataclass(frozen=True)
class PackingReport:
    """What packing saves. Padding in tokens: `without` one example per sequence, `with` the plan."""

    num_examples: int
    num_sequences: int
    num_tokens: int
    padding_without: int
    padding_with: int
    longest: int

    @property
    def padding_saved(self) -> float:
        """Share of the padded batch that the plan no longer computes, 0 to 1."""
        padded = self.num_tokens + self.padding_without
        return (self.padding_without - self.padding_with) / padded if padded else 0.0


def plan_sequences(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in sequences of at most `capacity` tokens.

    Each index comes once, none is split. The same lengths give the same plan. Raises ValueError for a
    length below 1 or above the capacity.
    """
    wrong = [f"item {index} has {length}" for index, length in enumerate(lengths) if not 1 <= length <= capacity]
    if wrong:
        raise ValueError(f"Lengths must lie between 1 and {capacity}: {', '.join(wrong[:5])}.")
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, sequence), sorted: the first that fits is the tightest
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(free, (lengths[index], 0))
        if place == len(free):
            left, number = capacity, len(sequences)
            sequences.append([])
        else:
            left, number = free.pop(place)
        sequences[number].append(index)
        insort(free, (left - lengths[index], number))
    return sequences


def plan_step(lengths: Sequence[int], pack: str, max_length: int, micro_batch_size: int) -> list[MicroBatch]:
    """The micro-batches of one optimizer step: lists of sequences, which are lists of indices into `lengths`.

    pack "none": one example per sequence; "sequence": best fit into sequences of `max_length` tokens.
    Sequences of like length share a micro-batch, `micro_batch_size` at most, so little is padded. Raises
    ValueError for a length above `max_length`, DataError for an unknown `pack`.
    """
    if pack not in PACKS:
        raise DataError(f"pack is {pack!r}.", f"Allowed: {', '.join(PACKS)}.")
    sequences = plan_sequences(lengths, max_length)
    if pack == "none":
        sequences = [[index] for index in range(len(lengths))]
    sequences.sort(key=lambda sequence: (-sum(lengths[index] for index in sequence), sequence))
    return [sequences[start : start + micro_batch_size] for start in range(0, len(sequences), micro_batch_size)]


def plan_steps(
    lengths: Sequence[int],
    order: Sequence[int],
    examples_per_step: int,
    pack: str,
    max_length: int,
    micro_batch_size: int,
) -> Iterator[list[MicroBatch]]:
    """Yield every step's micro-batches, as indices into `lengths`; a step takes the next examples of `order`.

    A step always has the same number of examples (the last may have fewer), however they are packed.
    """
    for start in range(0, len(order), examples_per_step):
        chosen = order[start : start + examples_per_step]
        step = plan_step([lengths[index] for index in chosen], pack, max_length, micro_batch_size)
        yield [[[chosen[index] for index in sequence] for sequence in batch] for batch in step]


def packing_report(
    lengths: Sequence[int],
    order: Sequence[int],
    examples_per_step: int,
    pack: str,
    max_length: int,
    micro_batch_size: int,
) -> PackingReport:
    """Compare the plan of `plan_steps` with padding the examples in the order they come."""
    sizes = (micro_batch_size, len(order) or 1)
    naive = [[[index] for index in order[start : start + sizes[0]]] for start in range(0, sizes[1], sizes[0])]
    steps = plan_steps(lengths, order, examples_per_step, pack, max_length, micro_batch_size)
    planned = [batch for step in steps for batch in step]
    return PackingReport(
        num_examples=len(order),
        num_sequences=sum(len(batch) for batch in planned),
        num_tokens=sum(lengths[index] for index in order),
        padding_without=sum(_padding(lengths, batch) for batch in naive),
        padding_with=sum(_padding(lengths, batch) for batch in planned),
        longest=max((lengths[index] for index in order), default=0),
    )


def _padding(lengths: Sequence[int], batch: MicroBatch) -> int:
    """Tokens that fill the sequences of a micro-batch up to its longest."""
    totals = [sum(lengths[index] for index in sequence) for sequence in batch]
    return max(totals, default=0) * len(totals) - sum(totals)
