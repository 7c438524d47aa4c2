"""Device, number format, threads and seeds."""

import random

import numpy
import pytest
import torch

from studio.engine import devices
from studio.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert devices.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        devices.pick_device(name)


def test_auto_dtype_follows_what_the_cpu_computes_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({}, torch.float32),
        ({"avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert devices.pick_dtype("auto", CPU) == expected


def test_dtype_by_name() -> None:
    assert devices.pick_dtype("float32", CPU) == torch.float32
    assert devices.pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="float16 needs a GPU.*bfloat16"):
        devices.pick_dtype("float16", CPU)


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert devices.set_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        assert 1 <= devices.set_threads() <= 1024
    finally:
        torch.set_num_threads(before)


def test_every_generator_is_seeded() -> None:
    draws = []
    for _ in range(2):
        devices.seed_all(7)
        draws.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_memory_is_measured() -> None:
    assert devices.memory_metric(CPU)["system/memory_bytes"] > 10_000_000


@pytest.mark.parametrize(("rank", "count", "number"), [(0, 1, 0), (3, 4, 3), (3, 1, 0)])
def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, rank: int, count: int, number: int) -> None:
    see_gpus(monkeypatch, rank, count)
    assert devices.pick_device() == torch.device("cuda", number)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 2, 2)
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU of its own; torch sees 2"):
        devices.pick_device()


def see_gpus(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
