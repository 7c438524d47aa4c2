"""What is fastest on a GPU is measured once, remembered for that GPU and torch, and never assumed."""

from collections.abc import Callable, Mapping

import pytest
import torch

from studio.engine.cuda import measured
from studio.engine.cuda.measured import Choice, choose, fastest

GPU = torch.device("cuda")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ways return their own seconds, and each call is noted."""
    calls: list[str] = []

    def seconds(way: Callable[[], float], device: torch.device) -> float:
        calls.append(way.__name__)
        return way()

    monkeypatch.setattr(measured, "seconds", seconds)
    monkeypatch.setattr(measured, "_key", lambda device: "a card, torch 2")
    return calls


def ours() -> float:
    return 0.002


def theirs() -> float:
    return 0.001


def broken() -> float:
    raise RuntimeError("no kernel image\nmore")


def test_only_what_is_clearly_faster_replaces_the_first() -> None:
    assert choose({"ours": 1.0, "theirs": 0.97}) == "ours"
    assert choose({"ours": 1.0, "theirs": 0.9}) == "theirs"
    assert choose({}) == ""


def test_measured_once_and_remembered(clock: list[str]) -> None:
    ways: Mapping[str, Callable[[], float]] = {"ours": ours, "theirs": theirs, "broken": broken}
    found = fastest("norm, 64 wide", ways, GPU)
    assert found == Choice("theirs", {"ours": 2.0, "theirs": 1.0}, {"broken": "no kernel image"})
    assert found.why == "measured on this GPU: ours 2 ms, theirs 1 ms, broken failed (no kernel image)"
    assert found.ranked == ["theirs", "ours"]
    assert fastest("norm, 64 wide", ways, GPU) == found and clock == ["ours", "theirs", "broken"]
    assert fastest("norm, 128 wide", {"ours": ours}, GPU).name == "ours"
    assert fastest("norm, 64 wide", ways, GPU) == found and len(clock) == 4  # both are remembered


def test_measured_anew_where_the_gpu_or_the_ways_are_others(clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fastest("norm", {"ours": ours}, GPU)
    assert fastest("norm", {"ours": ours, "theirs": theirs}, GPU).name == "theirs"
    monkeypatch.setattr(measured, "_key", lambda device: "another card, torch 2")
    fastest("norm", {"ours": ours, "theirs": theirs}, GPU)
    assert clock == ["ours", "ours", "theirs", "ours", "theirs"]


@pytest.mark.parametrize("text", ["", "[]", '{"key": "a card, torch 2", "found": {"norm": {"odd": 1}}}'])
def test_a_damaged_memory_is_none(clock: list[str], text: str) -> None:
    measured._file().parent.mkdir(parents=True)
    measured._file().write_text(text, encoding="utf-8")
    assert fastest("norm", {"ours": ours}, GPU).name == "ours" and clock == ["ours"]


def test_nothing_that_works(clock: list[str]) -> None:
    found = fastest("norm", {"broken": broken}, GPU)
    assert found.name == "" and found.ranked == []
    assert found.why == "measured on this GPU: nothing, broken failed (no kernel image)"
