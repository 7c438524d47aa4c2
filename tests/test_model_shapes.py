"""Weights counted from a config.json are those that torch counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.engine.models.families import native
from studio.errors import ModelError
from studio.model_shapes import FAMILIES, read_shapes, shapes_of
from tests.engine import test_families as families

SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
    {"attention_bias": True, "mlp_bias": True},
]


def model_of(kind: str, **settings: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **settings}))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_are_counted_as_torch_counts_them(kind: str, settings: dict[str, Any]) -> None:
    model = model_of(kind, **settings)
    shapes = shapes_of(json.loads(model.config.to_json_string(use_diff=False)))
    assert shapes.num_weights == sum(parameter.numel() for parameter in model.parameters())
    named = {name: tuple(p.shape) for name, p in model.named_parameters() if ".layers.0." in name and p.ndim == 2}
    counted = {linear.name: (linear.num_out, linear.num_in) for linear in shapes.linears}
    assert {name.split(".")[-2]: shape for name, shape in named.items()} == counted
    assert shapes.is_known


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda each: each.__name__)
def test_families_with_code_of_their_own_are_counted_as_they_are_computed(
    tmp_path: Path, family: families.Making
) -> None:
    config = {**family()[0], "bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = native(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found.config)
    shapes = read_shapes(tmp_path)
    assert shapes.is_known and shapes.num_weights == sum(parameter.numel() for parameter in model.parameters())


def test_a_config_that_leaves_out_the_defaults_is_read_with_them() -> None:
    """As hubs have them: Llama-2's config.json names neither its key heads nor that its head is its own."""
    shapes = shapes_of(LLAMA_2_7B)
    assert (shapes.num_kv_heads, shapes.head_dim, shapes.is_tied) == (32, 128, False)
    assert shapes.num_weights == 6_738_415_616


def test_the_starter_is_counted_right(starter: Path) -> None:
    assert read_shapes(starter).num_weights == 134_515_008


def test_a_multimodal_config_is_read_by_its_text_part() -> None:
    nested = {"model_type": "gemma3", "text_config": {**LLAMA_2_7B, "model_type": "gemma3_text"}}
    assert shapes_of(nested).head_dim == 256


def test_an_unknown_architecture_is_counted_as_a_llama_and_says_so() -> None:
    other = shapes_of({**LLAMA_2_7B, "model_type": "new-thing"})
    assert not other.is_known and other.num_weights == shapes_of(LLAMA_2_7B).num_weights


def test_targets_by_name() -> None:
    shapes = shapes_of(LLAMA_2_7B)
    assert [linear.name for linear in shapes.targets("q_proj,self_attn.v_proj")] == ["q_proj", "v_proj"]
    assert shapes.targets("all-linear") == shapes.linears


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "x"}'])
def test_a_config_without_sizes_is_refused_with_what_is_missing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="hidden_size|cannot be read"):
        read_shapes(tmp_path)
