"""A base in 4 bits leaves nothing behind of the files that it was made of."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studio.engine.allocator import forget_copied
from studio.engine.models.load import load_base
from tests.engine.folders import make_base

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what is mapped")
@pytest.mark.parametrize(("bits", "is_mapped"), [(0, True), (4, False)])
def test_the_files_of_a_squeezed_base_are_let_go(tmp_path: Path, bits: int, is_mapped: bool) -> None:
    base = make_base(tmp_path / "base")
    loaded = load_base(base, dtype=torch.float32, bits=bits, device=torch.device("cpu"))
    assert (f"{base}/model.safetensors" in MAPS.read_text()) == is_mapped
    assert all(torch.isfinite(each).all() for each in loaded.model.parameters() if each.is_floating_point())


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what is mapped")
@pytest.mark.parametrize("is_mapped", [True, False])
def test_what_was_copied_of_a_file_is_forgotten_and_can_be_read_again(tmp_path: Path, is_mapped: bool) -> None:
    expected = torch.arange(500_000, dtype=torch.int32)
    expected.numpy().tofile(tmp_path / "numbers")
    mapped = torch.from_file(str(tmp_path / "numbers"), size=expected.numel(), dtype=torch.int32)
    numbers = mapped if is_mapped else mapped.clone()
    assert torch.equal(numbers, expected)  # all of it is in memory now
    before = _resident(numbers.data_ptr())
    forget_copied(numbers.data_ptr(), numbers.nbytes)
    assert (_resident(numbers.data_ptr()) < before // 10) == is_mapped
    assert torch.equal(numbers, expected)


FAULTS = """
import resource, torch
from studio.engine.allocator import keep_freed
keep_freed()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4_000_000) for _ in range(20)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others cannot be told")
def test_a_steps_blocks_are_taken_from_the_system_once() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, *_, last = (int(line) for line in done.stdout.split())
    assert last < first / 10


def _resident(address: int) -> int:
    """Kilobytes in memory of what is mapped at an address."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(border, 16) for border in first.split("-"))
            is_there = start <= address < end
        elif is_there and first == "Rss:":
            return int(line.split()[1])
    return 0
