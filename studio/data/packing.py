"""Decides which examples share a row of a batch and which rows share a micro-batch. Lists of ints in, plans out.

A plan depends on lengths or ids alone: the same on every machine and on every rank, at whatever step it begins.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from studio.data.tokens import IGNORE_INDEX, Example
from studio.errors import DataError

PACKS = ("none", "sequence", "tree")
TREE_NODES = 1024  # in one row, unless an example is longer: beyond that a forward pass gains nothing on a CPU
SMALLEST_ROOM = 64  # rows of a fixed size have a multiple of this many tokens
Ints = NDArray[np.int64]
MicroBatch = list[list[int]]  # rows of a batch; a row is a list of examples, by index


@dataclass(frozen=True)
class PackingReport:
    """What packing saves. Padding in tokens: `without` one example per row as they come, `with` the plan.

    `prefix_tokens_saved`: tokens that a tree computes for one example instead of for each, or not at all because
    nothing trained follows. `longest` in tokens; `truncations` are the examples that were cut.
    """

    num_examples: int
    num_sequences: int
    num_tokens: int
    padding_without: int
    padding_with: int
    longest: int
    prefix_tokens_saved: int
    truncations: int

    @property
    def padding_saved(self) -> float:
        """Share of the padded batch that the plan no longer computes, 0 to 1."""
        padded = self.num_tokens + self.padding_without
        return (self.padding_without - self.padding_with) / padded if padded else 0.0

    @property
    def prefix_saved(self) -> float:
        """Share of the tokens that a tree does not compute, 0 to 1."""
        return self.prefix_tokens_saved / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True)
class PrefixTree:
    """Tokens are nodes, a node's position is its depth, it attends to its ancestors.

    `tokens`, `depths`, `ends`: (nodes,) int64, in depth-first order, so the descendants of a node follow it without a
    gap, up to but not including its `ends`. An edge asks a node, `places`, for a token, `targets`; `weights` says for
    how many examples: (edges,) int64. `num_tokens` are those of all examples, shared ones counted every time.
    """

    tokens: Ints
    depths: Ints
    ends: Ints
    places: Ints
    targets: Ints
    weights: Ints
    num_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)


def grow_tree(examples: Sequence[Example]) -> PrefixTree:
    """The tree of examples that come in alphabetical order of their ids; each must have a trained token.

    Tokens after the last trained one's predecessor are left out: they change nothing.
    """
    longest = max(len(example.input_ids) for example in examples)
    path = np.empty(longest, np.int64)  # the node at each depth of the newest example
    ends = np.empty(sum(len(example.input_ids) for example in examples), np.int64)
    tokens, depths, places, targets = [], [], [], []
    before, size = np.empty(0, np.int64), 0
    for example in examples:
        needed = needed_length(example.labels)
        ids, labels = np.asarray(example.input_ids[:needed]), np.asarray(example.labels[1 : needed + 1])
        shared = _num_equal(before, ids)
        ends[path[shared : len(before)]] = size
        path[shared:needed] = np.arange(size, size + needed - shared)
        tokens.append(ids[shared:])
        depths.append(np.arange(shared, needed))
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        places.append(path[trained])
        targets.append(labels[trained])
        before, size = ids, size + needed - shared
    ends[path[: len(before)]] = size
    return PrefixTree(
        np.concatenate(tokens),
        np.concatenate(depths),
        ends[:size],
        *_counted(np.concatenate(places), np.concatenate(targets)),
        sum(len(example.input_ids) for example in examples),
    )


def filler(trees: Sequence[PrefixTree], room: Callable[[int], int]) -> PrefixTree:
    """What makes the row of these trees one of the sizes that `room` gives: a last chain of nodes that nothing of them
    sees or trains, and edges of weight zero from its first node, if there is one."""
    num_nodes, num_edges = sum(map(len, trees)), sum(len(tree.targets) for tree in trees)
    nodes = np.zeros(room(num_nodes) - num_nodes, np.int64)
    edges = np.zeros(room(num_edges) - num_edges if len(nodes) else 0, np.int64)
    return PrefixTree(nodes, nodes, np.full_like(nodes, len(nodes)), edges, edges, edges, 0)


def few_rooms(number: int) -> int:
    """The next of a few larger sizes: multiples of SMALLEST_ROOM, and at most a quarter more than a large `number`."""
    step = max(SMALLEST_ROOM, 1 << max(0, number.bit_length() - 3))
    return (number // step + 1) * step


def close_rooms(number: int) -> int:
    """`number`, or the next of sixteen sizes between a power of two and the next: at most a sixteenth more."""
    step = 1 << max(0, number.bit_length() - 5)
    return -(-number // step) * step


def _num_equal(one: Ints, other: Ints) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _counted(places: Ints, targets: Ints) -> tuple[Ints, Ints, Ints]:
    """The different pairs, in order of their places, and how often each comes."""
    span = int(targets.max()) + 1
    pairs, counts = np.unique(places * span + targets, return_counts=True)
    return pairs // span, pairs % span, counts


def needed_length(labels: Sequence[int]) -> int:
    """Tokens up to the one that predicts the last trained token; what follows changes nothing.

    Raises ValueError when no token after the first is trained.
    """
    for index in range(len(labels) - 1, 0, -1):
        if labels[index] != IGNORE_INDEX:
            return index
    raise ValueError("An example without a trained token cannot be part of a tree.")


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


def plan_trees(ids: Sequence[Sequence[int]], capacity: int) -> list[list[int]]:
    """Indices of `ids` in groups whose trees have at most `capacity` nodes (or hold a single example).

    In alphabetical order neighbours share most, and what a new example shares with a tree it shares with its
    predecessor. The largest tree comes first.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for index in sorted(range(len(ids)), key=lambda index: (ids[index], index)):
        new = len(ids[index]) - (num_shared(ids[groups[-1][-1]], ids[index]) if groups else 0)
        if groups and sizes[-1] + new <= capacity:
            groups[-1].append(index)
            sizes[-1] += new
        else:
            groups.append([index])
            sizes.append(len(ids[index]))
    return [groups[number] for number in sorted(range(len(groups)), key=lambda number: -sizes[number])]


def num_nodes(ids: Sequence[Sequence[int]]) -> int:
    """Nodes of one tree of all ids."""
    ordered = sorted(ids)
    shared = sum(num_shared(one, other) for one, other in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def plan_step(
    examples: Sequence[Example], pack: str, max_length: int, micro_batch_size: int, num_ranks: int = 1
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step: lists of rows, which are lists of indices into `examples`.

    pack "none": one example per row; "sequence": best fit into rows of `max_length` tokens; "tree": a row holds
    examples that share their beginnings. Rows of like size share a micro-batch, `micro_batch_size` at most, so
    little is padded. Trees are made so small that each of `num_ranks` finds a row, unless one example is a rank's
    share. Raises ValueError for an example longer than `max_length`, DataError for an unknown `pack`.
    """
    if pack not in PACKS:
        raise DataError(f"pack is {pack!r}.", f"Allowed: {', '.join(PACKS)}.")
    lengths = [len(example.input_ids) for example in examples]
    if pack == "tree":
        ids = [example.input_ids[: needed_length(example.labels)] for example in examples]
        rows = plan_trees(ids, max([min(TREE_NODES, micro_batch_size * max_length), *lengths]))
        if len(rows) < num_ranks:
            rows = plan_trees(ids, max([num_nodes(ids) // num_ranks, *map(len, ids)]))
    else:
        rows = plan_sequences(lengths, max_length)
        if pack == "none":
            rows = [[index] for index in range(len(lengths))]
        rows.sort(key=lambda row: (-sum(lengths[index] for index in row), row))
    return [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]


def plan_steps(
    examples: Sequence[Example],
    order: Sequence[int],
    examples_per_step: int,
    pack: str,
    max_length: int,
    micro_batch_size: int,
    first_step: int = 0,
) -> Iterator[list[MicroBatch]]:
    """Yield every step's micro-batches from `first_step` (from 0) on, as indices into `examples`.

    A step takes the next examples of `order`, always the same number (the last may have fewer), however they are
    packed; so a plan that begins later is the end of the whole one.
    """
    for start in range(first_step * examples_per_step, len(order), examples_per_step):
        chosen = order[start : start + examples_per_step]
        step = plan_step([examples[index] for index in chosen], pack, max_length, micro_batch_size)
        yield [[[chosen[index] for index in row] for row in batch] for batch in step]


def plan_rank(
    plan: Sequence[MicroBatch], rank: int, world: int, cost: Callable[[list[int]], int] = len
) -> list[MicroBatch]:
    """The part of a step's plan that `rank` (from 0) of `world` computes; all parts together are the plan.

    `cost` says the tokens of a row; ranks get about the same sum. Every rank has the same number of micro-batches,
    none of them larger than the plan's, and none empty unless there are fewer rows than micro-batches.
    """
    if not 0 <= rank < world:
        raise ValueError(f"Rank {rank} is not one of {world}.")
    if world == 1 or not plan:
        return list(plan)
    rows = [row for batch in plan for row in batch]
    size = max(len(batch) for batch in plan)
    num_batches = -(-len(rows) // (size * world))
    least = num_batches if len(rows) >= num_batches * world else 0
    mine = _balanced(rows, world, least, size * num_batches, cost)[rank]
    ends = [len(mine) * number // num_batches for number in range(num_batches + 1)]
    return [mine[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _balanced(
    rows: list[list[int]], world: int, least: int, most: int, cost: Callable[[list[int]], int]
) -> list[MicroBatch]:
    """The dearest row goes to whoever has least; `least` to `most` rows each."""
    parts: list[MicroBatch] = [[] for _ in range(world)]
    loads = [0] * world
    dearest_first = sorted(range(len(rows)), key=lambda number: (-cost(rows[number]), number))
    for num_left, number in zip(range(len(rows), 0, -1), dearest_first, strict=True):
        num_owed = sum(max(0, least - len(part)) for part in parts)
        limit = least if num_owed >= num_left else most
        free = [rank for rank in range(world) if len(parts[rank]) < limit]
        rank = min(free, key=lambda rank: (loads[rank], len(parts[rank]), rank))
        parts[rank].append(rows[number])
        loads[rank] += cost(rows[number])
    return parts


def packing_report(
    examples: Sequence[Example],
    order: Sequence[int],
    examples_per_step: int,
    pack: str,
    max_length: int,
    micro_batch_size: int,
) -> PackingReport:
    """Compare the plan of `plan_steps` with padding the examples in the order they come."""
    lengths = {index: len(examples[index].input_ids) for index in order}
    starts = range(0, len(order), micro_batch_size)
    naive = [[lengths[index] for index in order[start : start + micro_batch_size]] for start in starts]
    steps = plan_steps(examples, order, examples_per_step, pack, max_length, micro_batch_size)
    planned = [[row_tokens(examples, row, pack) for row in batch] for step in steps for batch in step]
    num_tokens = sum(lengths[index] for index in order)
    return PackingReport(
        num_examples=len(order),
        num_sequences=sum(len(batch) for batch in planned),
        num_tokens=num_tokens,
        padding_without=sum(_padding(batch) for batch in naive),
        padding_with=sum(_padding(batch) for batch in planned),
        longest=max(lengths.values(), default=0),
        prefix_tokens_saved=num_tokens - sum(sum(batch) for batch in planned),
        truncations=sum(examples[index].truncated for index in order),
    )


def row_tokens(examples: Sequence[Example], row: Sequence[int], pack: str) -> int:
    """Tokens that a row of a plan computes."""
    if pack != "tree":
        return sum(len(examples[index].input_ids) for index in row)
    return len(grow_tree([examples[index] for index in row]))


def _padding(widths: Sequence[int]) -> int:
    """Tokens that fill the rows of a micro-batch up to its longest."""
    return max(widths, default=0) * len(widths) - sum(widths)
