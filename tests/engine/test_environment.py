"""What is set before torch is imported keeps a long run's memory from growing with the shapes that it has seen."""

import os
import subprocess
import sys

import pytest
import torch

from studio.engine import environment
from studio.paths import REPOSITORY

GROWTH = """
import os, re, sys
from studio.engine import environment
if sys.argv[1] == "prepared":
    environment.prepare()
import torch
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in range(1, 300):  # more than are kept: from here on only what is not let go adds up
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
before = resident()
for rows in range(300, 960):
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
print(resident() - before)
"""


def growth(how: str) -> int:
    """Kilobytes that products of 660 shapes leave behind."""
    own = {name: value for name, value in os.environ.items() if name not in environment.SETTINGS}
    line = [sys.executable, "-c", GROWTH, how]
    done = subprocess.run(line, cwd=REPOSITORY, env=own, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="kernels are compiled for bfloat16 where the CPU has it"
)
def test_kernels_of_shapes_long_gone_are_not_kept() -> None:
    assert growth("prepared") < growth("as it is") / 2


def test_what_the_person_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.SETTINGS:
        monkeypatch.setenv(name, "")  # so that whatever is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    environment.prepare()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
