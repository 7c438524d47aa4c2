"""The self-test says that the base is untouched, and notices when it is not."""

from pathlib import Path

import pytest
import torch

from studio.engine.served import ModelPool
from studio.engine.weights import weights_hash
from tests.engine.folders import lora_model


@pytest.fixture
def pool(tiny_model: Path, tmp_path: Path) -> ModelPool:
    lora_model(tiny_model).save_pretrained(tmp_path / "tuned")
    pool = ModelPool("tiny", tiny_model, torch.float32, torch.device("cpu"))
    pool.add("tuned", tmp_path / "tuned")
    return pool


def test_with_the_adapters_off_the_logits_are_the_bases(pool: ModelPool, tiny_model: Path, tmp_path: Path) -> None:
    found = pool.self_test()
    assert found["off"] == {"bit_equal": True, "max_difference": 0.0}
    assert found["beside"]["tuned"]["max_difference"] < 1e-4
    assert found["on"]["tuned"]["max_difference"] > 0.01
    assert (found["base"], found["num_questions"]) == ("tiny", 3)
    assert pool.find("tuned").hash == weights_hash(tmp_path / "tuned")


def test_a_base_that_was_changed_is_found_out(pool: ModelPool) -> None:
    base = pool.ready(pool.base).model
    weight = next(p for name, p in base.named_parameters() if "layers.0.self_attn.q_proj.base_layer.weight" in name)
    with torch.no_grad():
        weight[0, 0] += 0.01
    off = pool.self_test()["off"]
    assert not off["bit_equal"] and off["max_difference"] > 0


def test_a_base_alone_is_itself(tiny_model: Path) -> None:
    pool = ModelPool("tiny", tiny_model, torch.float32, torch.device("cpu"))
    found = pool.self_test()
    assert found["off"]["bit_equal"] and found["on"] == {}
