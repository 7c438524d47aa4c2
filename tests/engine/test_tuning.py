"""How a processor computes fastest is measured once, remembered, and overruled by what the person sets."""

import json

import pytest

from studio.engine import devices, tuning
from studio.engine.tuning import DEFAULT_SPIN, Tuning, choose

DEFAULT = (2, DEFAULT_SPIN)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that whatever a test sets is undone
        monkeypatch.delenv(name)


def test_only_what_is_clearly_faster_is_chosen() -> None:
    times = {DEFAULT: {"float32": 4.0, "bfloat16": 1.0}, (2, "0"): {"float32": 4.0, "bfloat16": 0.95}}
    assert choose(times, DEFAULT) == Tuning(*DEFAULT, 4.0)
    times[2, "0"] = {"float32": 3.0, "bfloat16": 0.6}
    assert choose(times, DEFAULT) == Tuning(2, "0", 5.0)


def test_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SPINS", (DEFAULT_SPIN,))
    monkeypatch.setattr(tuning, "BUSY_LOAD", 1e9)
    monkeypatch.setattr(tuning.psutil, "cpu_count", lambda logical=True: 1)
    found = tuning.apply()
    assert found.threads == 1 and found.spin == DEFAULT_SPIN and found.bfloat16_gain > 0
    assert tuning.remembered() == found
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(tuning, "_times", lambda *settings: pytest.fail("measured again"))
    assert tuning.apply() == found


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUSY_LOAD", -1.0)
    assert tuning.apply() == Tuning(tuning.cores()) and tuning.remembered() is None


def test_what_the_person_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert tuning.apply().threads == 3 and tuning.remembered() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert tuning.apply().threads == 4


@pytest.mark.parametrize("text", ["", "[]", '{"key": "another"}', '{"key": 1, "tuning": {"odd": 2}}'])
def test_a_damaged_memory_is_none(text: str) -> None:
    tuning._file().parent.mkdir(parents=True)
    tuning._file().write_text(text, encoding="utf-8")
    assert tuning.remembered() is None


def test_bfloat16_that_was_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = devices.torch
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert devices.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    tuning._file().parent.mkdir(parents=True)
    value = {"key": tuning._key(), "tuning": {"threads": 1, "spin": "0", "bfloat16_gain": 0.7}}
    tuning._file().write_text(json.dumps(value), encoding="utf-8")
    assert devices.pick_dtype("auto", torch.device("cpu")) == torch.float32
