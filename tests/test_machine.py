"""What this machine is, without torch: as torch sees it."""

import subprocess
from pathlib import Path

import pytest
import torch

from studio import machine
from studio.engine.devices import has_fast_bfloat16


@pytest.fixture
def fresh() -> None:
    machine.device.cache_clear()
    yield
    machine.device.cache_clear()


def test_the_processor_is_seen_as_torch_sees_it() -> None:
    found = machine.cpu()
    assert found.has_bfloat16 == has_fast_bfloat16(torch.device("cpu"))
    assert found.name and 2**28 < found.memory_bytes < 2**46


def test_the_first_gpu_is_taken(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3070, 8192, 8.6'\necho 'Old card, 4096, 7.5'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = machine.device()
    assert (found.kind, found.name) == ("cuda", "NVIDIA GeForce RTX 3070")
    assert found.memory_bytes == 8 * 2**30 and found.has_bfloat16


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo 'A, B, C'"])
def test_a_driver_without_a_card_leaves_the_processor(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert subprocess.run(["nvidia-smi"], capture_output=True).returncode in (0, 9)
    assert machine.device() == machine.cpu()


def test_all_code_that_computes_counts_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    (tmp_path / "studio").mkdir()
    found = set()
    for name in ("loop.py", "kernels.cpp"):
        (tmp_path / "studio" / name).write_text("1")
        found.add(machine._code.__wrapped__())
        (tmp_path / "studio" / name).write_text("2")
        found.add(machine._code.__wrapped__())
    assert len(found) == 4


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_a_container_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """Pages of files that it holds are given up when somebody asks."""
    assert 0 < machine.free_bytes() <= machine.memory_bytes()
    folder, *names, cached = machine.GROUP_FILES[2 - version]
    own = tmp_path / folder.name
    own.mkdir()
    for name, text in zip(names, ("1000000", "700000"), strict=True):
        (own / name).write_text(f"{text}\n")
    (own / "memory.stat").write_text(f"cache 500000\n{cached} 200000\n")
    monkeypatch.setattr(machine, "GROUP_FILES", [(own, *names, cached)])
    assert machine.free_bytes() == 500_000
    (own / names[0]).write_text("max\n")
    assert machine.free_bytes() > 10**6


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_are_not_computed_on(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3070, 8192, 8.6'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.device() == machine.cpu() and machine.hides_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not machine.hides_gpus()


def test_a_compiler_is_one_on_the_path_or_what_it_has_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not machine.has_compiler()
    library = tmp_path / "retune" / "extensions" / "kernels-0.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert machine.has_compiler()
    library.unlink()
    monkeypatch.setenv("CXX", "sh")
    assert machine.has_compiler()
