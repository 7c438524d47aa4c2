"""A base in 4 bits leaves nothing behind of the files that it was made of."""

import sys
from pathlib import Path

import pytest
import torch

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
