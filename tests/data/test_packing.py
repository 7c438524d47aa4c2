"""Every example is packed exactly once, nothing is split, and nothing is longer than allowed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data.packing import packing_report, plan_sequences, plan_step, plan_steps
from studio.errors import DataError

lengths_lists = st.lists(st.integers(1, 64), max_size=60)


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


@given(lengths=lengths_lists, pack=st.sampled_from(["none", "sequence"]), size=st.integers(1, 8))
def test_a_step_holds_every_example_once(lengths: list[int], pack: str, size: int) -> None:
    step = plan_step(lengths, pack, 64, size)
    assert Counter(i for batch in step for sequence in batch for i in sequence) == Counter(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in step)
    if pack == "none":
        assert all(len(sequence) == 1 for batch in step for sequence in batch)


def test_without_packing_like_lengths_share_a_micro_batch() -> None:
    assert plan_step([9, 1, 8, 2], "none", 10, 2) == [[[0], [2]], [[3], [1]]]


def test_unknown_packing_is_refused() -> None:
    with pytest.raises(DataError, match="none, sequence"):
        plan_step([1], "tight", 10, 1)


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40), pack=st.sampled_from(["none", "sequence"]))
def test_steps_take_the_examples_in_order(lengths: list[int], pack: str) -> None:
    order = list(reversed(range(len(lengths)))) * 2
    steps = list(plan_steps(lengths, order, 8, pack, 32, 2))
    taken = [sorted(i for batch in step for sequence in batch for i in sequence) for step in steps]
    assert taken == [sorted(order[start : start + 8]) for start in range(0, len(order), 8)]


def test_report_counts_padding_by_hand() -> None:
    report = packing_report([9, 1, 8, 2], [0, 1, 2, 3], 4, "sequence", 10, 2)
    assert (report.num_examples, report.num_tokens, report.longest) == (4, 20, 9)
    assert report.padding_without == (9 - 1) + (8 - 2)
    assert (report.num_sequences, report.padding_with) == (2, 0)
    assert report.padding_saved == pytest.approx(14 / 34)


def test_report_of_nothing() -> None:
    report = packing_report([], [], 4, "sequence", 10, 2)
    assert (report.num_sequences, report.padding_saved) == (0, 0.0)
