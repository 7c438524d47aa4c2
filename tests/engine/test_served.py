"""Weights behind the server's names: a base in either format has a fingerprint."""

from pathlib import Path

import torch

from studio.engine.served import ModelPool
from studio.models import model_fingerprint
from tests.engine.folders import as_torch_file, make_base


def test_a_base_of_the_older_format_is_served(tmp_path: Path) -> None:
    base = as_torch_file(make_base(tmp_path / "base"))
    pool = ModelPool("mine", base, torch.float32, torch.device("cpu"))
    assert [(weights.name, weights.hash) for weights in pool.listed()] == [("mine", model_fingerprint(base))]
    assert pool.find("base").hash == model_fingerprint(base)
