"""Intervals and differences of paired marks, against published figures and against what must always hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.probes.paired import difference, mcnemar, mean, paired_interval, rate, share_difference, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(12, 12, 0.7575, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_rate_and_stays_in_range(total: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, total))
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total <= high <= 1


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292)],  # Newcombe 1998, table II, method 10
)
def test_paired_intervals(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    assert paired_interval(*cells) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar_is_a_fair_coin() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(12, 2) == pytest.approx(0.012939, abs=1e-6)


def test_a_difference_is_seen_only_where_both_say_so() -> None:
    assert difference([(False, True)] * 5 + [(True, True)] * 5)["seen"] == "none"
    assert difference([(False, True)] * 6 + [(True, True)] * 6)["seen"] == "more"
    lost = difference([(True, False)] * 8 + [(True, True)] * 2)
    assert (lost["seen"], lost["gained"], lost["lost"], lost["value"]) == ("fewer", 0, 8, -0.8)
    assert difference([]) == {
        "value": None, "low": -1.0, "high": 1.0, "gained": 0, "lost": 0, "p": 1.0, "total": 0, "seen": "none"
    }  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_an_interval_holds_its_difference_and_turns_with_it(pairs: list[tuple[bool, bool]]) -> None:
    found, turned = difference(pairs), difference([(tuned, base) for base, tuned in pairs])
    assert -1 - 1e-9 <= found["low"] <= found["value"] + 1e-9
    assert found["value"] - 1e-9 <= found["high"] <= 1 + 1e-9
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))
    assert turned["p"] == found["p"]
    assert rate(tuned for _, tuned in pairs)["rate"] - rate(base for base, _ in pairs)["rate"] == pytest.approx(
        found["value"]
    )


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_a_difference_of_shares_lies_in_its_interval_and_turns(first: list[bool], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.booleans(), min_size=len(first), max_size=len(first)))
    value, low, high = share_difference(first, second)
    assert -1 <= low <= value <= high <= 1
    assert value == pytest.approx((sum(first) - sum(second)) / len(first))
    back = share_difference(second, first)
    assert back == pytest.approx((-value, -high, -low))


def test_the_interval_of_a_mean_holds_it() -> None:
    found = mean([0.0, 1.0, 2.0, 3.0], lambda values: sum(values) / len(values))
    assert found["low"] < found["value"] == 1.5 < found["high"]
    assert mean([2.0], lambda values: values[0]) == {"value": 2.0, "low": 2.0, "high": 2.0}
