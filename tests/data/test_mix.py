"""An epoch shows every row, keeps the shares everywhere, and can be picked up at any position."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.data.mix import MAX_EPOCH_ROWS, epoch_length, iterate, plan_epoch, rows_for
from studio.errors import DataError

PINNED = [("a", 0), ("b", 0), ("a", 2), ("b", 1), ("a", 1), ("b", 0)]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, float]]:
    names = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True))
    sizes = {name: draw(st.integers(1, 40)) for name in names}
    return sizes, {name: draw(st.floats(0.05, 3.0)) for name in names}


@settings(deadline=None)
@given(mix=mixes(), seed=st.integers(0, 9))
def test_an_epoch_shows_every_row_and_each_row_of_a_source_equally_often(mix: tuple, seed: int) -> None:
    sizes, shares = mix
    plan = plan_epoch(sizes, shares, seed, 0)
    assert len(plan) == epoch_length(sizes, shares)
    seen = Counter(plan)
    for name, size in sizes.items():
        times = [seen[name, row] for row in range(size)]
        assert min(times) >= 1 and max(times) - min(times) <= 1
    assert sum(seen.values()) == sum(seen[name, row] for name, size in sizes.items() for row in range(size))


@settings(deadline=None)
@given(mix=mixes())
def test_every_stretch_has_the_shares(mix: tuple) -> None:
    sizes, shares = mix
    names = [name for name, _ in plan_epoch(sizes, shares, 1, 0)]
    total = sum(shares.values())
    for end in range(len(names) + 1):
        for name, share in shares.items():
            assert abs(names[:end].count(name) - end * share / total) <= len(shares)


def test_two_equal_shares_alternate() -> None:
    names = [name for name, _ in plan_epoch({"identity": 6, "general": 2}, {"identity": 1, "general": 1}, 0, 0)]
    assert len(names) == 12
    assert all(set(names[start : start + 2]) == {"identity", "general"} for start in range(0, 12, 2))


def test_shares_are_relative_and_rounding_never_loses_a_row() -> None:
    plan = plan_epoch({"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.1, "c": 0.1}, 0, 0)
    assert sorted(plan) == [("a", 0), ("b", 0), ("c", 0)]


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    sizes, shares = {"a": 50, "b": 30}, {"a": 0.5, "b": 0.5}
    plan = plan_epoch(sizes, shares, 3, 0)
    assert plan == plan_epoch({"b": 30, "a": 50}, {"b": 1, "a": 1}, 3, 0)
    assert plan != plan_epoch(sizes, shares, 4, 0)
    assert plan != plan_epoch(sizes, shares, 3, 1)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert plan_epoch({"a": 3, "b": 2}, {"a": 1, "b": 1}, 7, 0) == PINNED


@settings(deadline=None)
@given(mix=mixes(), start=st.integers(0, 300))
def test_any_position_can_be_resumed(mix: tuple, start: int) -> None:
    sizes, shares = mix
    whole = list(islice(iterate(sizes, shares, 5), start + 20))
    assert list(islice(iterate(sizes, shares, 5, start), 20)) == whole[start:]
    assert rows_for(sizes, shares, 5, 20, start) == whole[start:]


@pytest.mark.parametrize(
    ("sizes", "shares", "told"),
    [
        ({}, {}, "same sources"),
        ({"a": 1}, {"b": 1}, "same sources"),
        ({"a": 0}, {"a": 1}, "no rows"),
        ({"a": 1}, {"a": 0}, "above 0"),
        ({"a": 1}, {"a": float("nan")}, "above 0"),
        ({"a": 1}, {"a": float("inf")}, "above 0"),
        ({"a": MAX_EPOCH_ROWS, "b": 1}, {"a": 0.001, "b": 1}, "larger share"),
    ],
)
def test_impossible_mixes_are_refused(sizes: dict, shares: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        plan_epoch(sizes, shares, 0, 0)
