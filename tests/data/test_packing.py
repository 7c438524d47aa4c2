"""Every example is packed exactly once, nothing is split, nothing is longer than allowed, and ranks share fairly."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from studio.data.packing import (
    PACKS,
    MicroBatch,
    PrefixTree,
    close_rooms,
    few_rooms,
    grow_tree,
    needed_length,
    num_nodes,
    packing_report,
    plan_rank,
    plan_sequences,
    plan_step,
    plan_steps,
    plan_trees,
)
from studio.data.tokens import IGNORE_INDEX, Example
from studio.errors import DataError

lengths_lists = st.lists(st.integers(1, 64), max_size=60)
packs = st.sampled_from(PACKS)


def make_example(ids: list[int], first_trained: int = 1, truncated: bool = False) -> Example:
    return Example(ids, [IGNORE_INDEX] * first_trained + ids[first_trained:], truncated)


def of_lengths(lengths: list[int]) -> list[Example]:
    return [make_example([index + 1] * length) for index, length in enumerate(lengths)]


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Examples of few different tokens, so that many begin alike."""
    rows = draw(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=24), max_size=30))
    return [make_example(ids, draw(st.integers(1, len(ids) - 1))) for ids in rows]


def members(plan: list[MicroBatch]) -> list[int]:
    return sorted(index for batch in plan for row in batch for index in row)


@given(lengths=lengths_lists)
def test_sequences_hold_every_index_once_within_capacity(lengths: list[int]) -> None:
    plan = plan_sequences(lengths, 64)
    assert sorted(index for sequence in plan for index in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in sequence) <= 64 for sequence in plan)
    assert plan == plan_sequences(lengths, 64)


@given(lengths=lengths_lists)
def test_best_fit_wastes_less_than_half(lengths: list[int]) -> None:
    """At most one sequence is half empty, else the two emptiest would have shared one."""
    plan = plan_sequences(lengths, 64)
    assert sum(2 * sum(lengths[index] for index in sequence) <= 64 for sequence in plan) <= 1


def test_best_fit_takes_the_tightest_gap() -> None:
    assert plan_sequences([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_length_that_cannot_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"item 1 has {length}"):
        plan_sequences([3, length], 10)


@given(rows=examples(), capacity=st.integers(1, 60))
def test_trees_hold_every_example_once_within_capacity(rows: list[Example], capacity: int) -> None:
    groups = plan_trees([row.input_ids[: needed_length(row.labels)] for row in rows], capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    sizes = [len(grow_tree([rows[index] for index in group])) for group in groups]
    assert all(size <= capacity or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert sizes == sorted(sizes, reverse=True)


@given(rows=examples().filter(bool))
def test_a_tree_trains_what_its_examples_train(rows: list[Example]) -> None:
    """Nodes are the different beginnings, and the weight of an edge the number of examples trained there."""
    [group] = plan_trees([row.input_ids[: needed_length(row.labels)] for row in rows], 10_000)
    tree = grow_tree([rows[index] for index in group])
    asked = Counter(
        (tuple(row.input_ids[:index]), row.labels[index])
        for row in rows
        for index in range(1, len(row.labels))
        if row.labels[index] != IGNORE_INDEX
    )
    edges = zip(tree.places, tree.targets, tree.weights, strict=True)
    assert {(beginning_of(tree, int(place)), int(target)): int(n) for place, target, n in edges} == asked
    assert len({beginning_of(tree, node) for node in range(len(tree))}) == len(tree)
    assert tree.num_tokens == sum(len(row.input_ids) for row in rows)


def beginning_of(tree: PrefixTree, node: int) -> tuple[int, ...]:
    """The tokens of a node and those before it whose descendants it is among."""
    path = [other for other in range(node + 1) if node < tree.ends[other]]
    assert tree.depths[path].tolist() == list(range(len(path)))
    return tuple(tree.tokens[path].tolist())


def test_what_follows_the_last_trained_token_is_not_needed() -> None:
    assert needed_length([IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX]) == 2
    with pytest.raises(ValueError, match="trained"):
        needed_length([1, IGNORE_INDEX])


@given(rows=examples(), pack=packs, size=st.integers(1, 8))
def test_a_step_holds_every_example_once(rows: list[Example], pack: str, size: int) -> None:
    step = plan_step(rows, pack, 64, size)
    assert members(step) == list(range(len(rows)))
    assert all(1 <= len(batch) <= size for batch in step)
    assert step == plan_step(rows, pack, 64, size)
    if pack == "none":
        assert all(len(row) == 1 for batch in step for row in batch)


def test_without_packing_like_lengths_share_a_micro_batch() -> None:
    assert plan_step(of_lengths([9, 2, 8, 3]), "none", 10, 2) == [[[0], [2]], [[3], [1]]]


def test_unknown_packing_is_refused() -> None:
    with pytest.raises(DataError, match="none, sequence, tree"):
        plan_step(of_lengths([2]), "tight", 10, 1)


@given(rows=examples(), pack=packs, first_step=st.integers(0, 12))
def test_steps_take_the_examples_in_order_from_any_step_on(rows: list[Example], pack: str, first_step: int) -> None:
    order = list(reversed(range(len(rows)))) * 2
    steps = list(plan_steps(rows, order, 8, pack, 32, 2))
    assert [members(step) for step in steps] == [sorted(order[start : start + 8]) for start in range(0, len(order), 8)]
    assert list(plan_steps(rows, order, 8, pack, 32, 2, first_step)) == steps[first_step:]


@given(rows=examples(), world=st.integers(1, 4))
def test_every_rank_finds_a_tree(rows: list[Example], world: int) -> None:
    """Unless an example is more than a rank's share."""
    lines = [line for batch in plan_step(rows, "tree", 64, 8, world) for line in batch]
    assert sorted(index for line in lines for index in line) == list(range(len(rows)))
    ids = [row.input_ids[: needed_length(row.labels)] for row in rows]
    if ids and world * max(map(len, ids)) <= num_nodes(ids):
        assert len(lines) >= world


@given(rows=examples(), pack=packs, size=st.integers(1, 4), world=st.integers(1, 5))
@example(rows=of_lengths([7] + [2] * 10), pack="none", size=2, world=4)  # the long row is worth three short ones
def test_ranks_partition_a_plan(rows: list[Example], pack: str, size: int, world: int) -> None:
    plan = plan_step(rows, pack, 64, size)
    parts = [
        plan_rank(plan, rank, world, lambda row: sum(len(rows[i].input_ids) for i in row)) for rank in range(world)
    ]
    assert Counter(tuple(row) for part in parts for batch in part for row in batch) == Counter(
        tuple(row) for batch in plan for row in batch
    )
    assert len({len(part) for part in parts}) == 1
    assert all(len(batch) <= size for part in parts for batch in part)
    if sum(map(len, plan)) >= world * len(parts[0]):
        assert all(batch for part in parts for batch in part)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60), world=st.integers(2, 4))
def test_ranks_get_about_the_same_number_of_tokens(lengths: list[int], world: int) -> None:
    """With room to choose, no rank has more than another by more than the longest row."""
    plan = [[[index] for index in range(len(lengths))]]
    loads = [
        sum(lengths[row[0]] for batch in plan_rank(plan, rank, world, lambda row: lengths[row[0]]) for row in batch)
        for rank in range(world)
    ]
    assert max(loads) - min(loads) <= max(lengths)


def test_one_rank_has_the_whole_plan_and_a_rank_too_many_is_refused() -> None:
    plan = [[[0], [1]], [[2]]]
    assert plan_rank(plan, 0, 1) == plan
    assert [plan_rank([], rank, 2) for rank in (0, 1)] == [[], []]
    with pytest.raises(ValueError, match="Rank 2"):
        plan_rank(plan, 2, 2)


def test_report_counts_padding_by_hand() -> None:
    rows = [*of_lengths([9, 2, 8]), make_example([7, 7], truncated=True)]
    report = packing_report(rows, [0, 1, 2, 3], 4, "none", 10, 2)
    assert (report.num_examples, report.num_tokens, report.longest, report.truncations) == (4, 21, 9, 1)
    assert report.padding_without == (9 - 2) + (8 - 2)
    assert (report.num_sequences, report.padding_with, report.prefix_tokens_saved) == (4, (9 - 8), 0)
    assert report.padding_saved == pytest.approx(12 / 34)
    assert packing_report(rows, [0, 1, 2, 3], 4, "sequence", 11, 2).num_sequences == 2


def test_report_counts_shared_beginnings_by_hand() -> None:
    """Sixteen equal rows of 5 tokens are 4 nodes: the last token predicts nothing."""
    report = packing_report([make_example([5, 6, 7, 8, 9], 2)] * 16, list(range(16)), 16, "tree", 64, 4)
    assert (report.num_sequences, report.num_tokens, report.prefix_tokens_saved) == (1, 80, 76)
    assert (report.padding_with, report.prefix_saved) == (0, 0.95)


def test_report_of_nothing() -> None:
    report = packing_report([], [], 4, "sequence", 10, 2)
    assert (report.num_sequences, report.padding_saved, report.prefix_saved) == (0, 0.0, 0.0)


@given(st.integers(1, 100_000))
def test_rooms_are_large_enough(number: int) -> None:
    assert number <= close_rooms(number) <= number * 17 / 16 and number < few_rooms(number) <= number * 5 / 4 + 64
    assert close_rooms(close_rooms(number)) == close_rooms(number)


def test_rooms_are_few() -> None:
    """Sixteen between a power of two and the next; on a GPU, multiples of 64 and four between them."""
    assert {close_rooms(number) for number in range(513, 1025)} == set(range(544, 1025, 32))
    assert [close_rooms(number) for number in (1, 31, 33, 44, 65)] == [1, 31, 34, 44, 68]
    assert {few_rooms(number) for number in range(512, 1024)} == {640, 768, 896, 1024}
    assert [few_rooms(number) for number in (0, 1, 64)] == [64, 64, 128]
