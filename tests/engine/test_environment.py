"""What is set before torch is imported keeps a long run's memory from growing with the shapes that it has seen."""

import os
import subprocess
import sys

import pytest
import torch

from studio.engine import environment
from studio.paths import REPOSITORY

PRODUCTS = """
import sys
from studio.engine import environment
if sys.argv[1] == "prepared":
    environment.prepare()
import torch
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(2, 400), 2]:
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
"""


def last_kernel(how: str) -> str:
    """What oneDNN says of the kernel of a shape that comes again after 397 others."""
    own = {name: value for name, value in os.environ.items() if name not in environment.SETTINGS}
    line = [sys.executable, "-c", PRODUCTS, how]
    own["ONEDNN_VERBOSE"] = "profile_create"
    done = subprocess.run(line, cwd=REPOSITORY, env=own, capture_output=True, text=True, check=True)
    return next(line for line in reversed(done.stdout.splitlines()) if ",create:" in line)


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="kernels are compiled for bfloat16 where the CPU has it"
)
def test_kernels_of_shapes_long_gone_are_not_kept() -> None:
    """Each is half a megabyte; how much of that the system gets back differs from run to run."""
    assert "create:cache_hit" in last_kernel("as it is")
    assert "create:cache_miss" in last_kernel("prepared")


def test_a_missing_kernel_of_the_hub_is_no_line_in_every_log() -> None:
    lines = "from studio.engine import environment; environment.prepare(); from bitsandbytes.backends.cpu import ops"
    told = "import logging; logging.getLogger(ops.__name__).warning('kernels')"
    line = [sys.executable, "-c", f"{lines}; {told}"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "kernels" not in done.stderr


def test_what_the_person_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.SETTINGS:
        monkeypatch.setenv(name, "")  # so that whatever is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    environment.prepare()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
