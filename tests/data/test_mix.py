"""An epoch shows every row, keeps the shares everywhere, and can be picked up at any position."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.data.mix import MAX_EPOCH_ROWS, epoch_length, iterate, plan_epoch
from studio.errors import DataError

PINNED = [("a", 0), ("b", 0), ("a", 2), ("b", 1), ("a", 1), ("b", 0)]


@dataclass(frozen=True)
class Count:
    """As the config's RowCount."""

    rows: int


@st.composite
def counted(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, float | Count]]:
    """Mixes in which some sources have a number of rows."""
    sizes, shares = draw(mixes())
    return sizes, {name: Count(draw(st.integers(1, 60))) if draw(st.booleans()) else s for name, s in shares.items()}


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
@given(mix=counted(), seed=st.integers(0, 3))
def test_a_counted_source_gives_its_rows_to_every_epoch_on_top_of_the_shares(mix: tuple, seed: int) -> None:
    sizes, portions = mix
    shares = {name: portion for name, portion in portions.items() if isinstance(portion, float)}
    counts = {name: portion.rows for name, portion in portions.items() if isinstance(portion, Count)}
    of_shares = plan_epoch({name: sizes[name] for name in shares}, shares, seed, 1) if shares else []
    plan = plan_epoch(sizes, portions, seed, 1)
    assert len(plan) == epoch_length(sizes, portions) == len(of_shares) + sum(counts.values())
    assert Counter(name for name, _ in plan) == Counter(name for name, _ in of_shares) + Counter(counts)
    assert Counter(row for row in plan if row[0] in shares) == Counter(of_shares)


@settings(deadline=None)
@given(size=st.integers(1, 30), rows=st.integers(1, 70), epochs=st.integers(1, 6))
def test_a_counted_source_goes_on_where_the_epoch_before_stopped(size: int, rows: int, epochs: int) -> None:
    seen = Counter(row for epoch in range(epochs) for _, row in plan_epoch({"a": size}, {"a": Count(rows)}, 3, epoch))
    times = [seen[row] for row in range(size)]
    assert sum(times) == rows * epochs and max(times) - min(times) <= 1


def test_counted_and_shared_rows_alternate_evenly() -> None:
    names = [name for name, _ in plan_epoch({"a": 4, "b": 1000}, {"a": 0.5, "b": Count(8)}, 0, 0)]
    assert all(names[start : start + 3].count("a") == 1 for start in range(0, 12, 3))


@settings(deadline=None)
@given(mix=counted(), start=st.integers(0, 300))
def test_any_position_can_be_resumed(mix: tuple, start: int) -> None:
    sizes, shares = mix
    whole = list(islice(iterate(sizes, shares, 5), start + 20))
    assert list(islice(iterate(sizes, shares, 5, start), 20)) == whole[start:]


@pytest.mark.parametrize(
    ("sizes", "shares", "told"),
    [
        ({}, {}, "same sources"),
        ({"a": 1}, {"b": 1}, "same sources"),
        ({"a": 0}, {"a": 1}, "no rows"),
        ({"a": 1}, {"a": 0}, "above 0"),
        ({"a": 1}, {"a": float("nan")}, "above 0"),
        ({"a": 1}, {"a": float("inf")}, "above 0"),
        ({"a": 1}, {"a": Count(0)}, "1 or more"),
        ({"a": 1, "b": 1}, {"a": 1.0, "b": Count(MAX_EPOCH_ROWS)}, "number of rows"),
        ({"a": MAX_EPOCH_ROWS, "b": 1}, {"a": 0.001, "b": 1}, "larger share"),
    ],
)
def test_impossible_mixes_are_refused(sizes: dict, shares: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        plan_epoch(sizes, shares, 0, 0)


def test_all_adds_each_row_once_beside_shares_and_counts() -> None:
    sizes = {"en": 30, "zh": 7, "general": 5, "extra": 9}
    sources = {"en": "all", "zh": "all", "general": 1.0, "extra": Count(4)}
    seen = Counter(plan_epoch(sizes, sources, 0, 3))
    assert Counter(name for name, _ in seen.elements()) == {"en": 30, "zh": 7, "general": 5, "extra": 4}
    assert set(seen.values()) == {1}
    assert plan_epoch(sizes, sources, 0, 1) != plan_epoch(sizes, sources, 0, 0)
