"""What of a model learns, how it is saved, and how adapters come back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from studio.config.schema import RunConfig
from studio.engine import adapters
from studio.engine.models.load import LoadedModel
from studio.errors import CheckpointError, ConfigError, ModelError

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]


def test_lora_takes_every_linear_layer_but_the_head(load_tiny: Load, tiny_config: Make) -> None:
    model = adapters.attach(load_tiny(), tiny_config())
    names = list(adapters.trainable_state(model))
    assert len(names) == 2 * 7 * 2  # layers, linear layers each, A and B
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    assert names[0].endswith(("lora_A.weight", "lora_B.weight"))


def test_target_modules_by_name_and_by_a_wrong_name(load_tiny: Load, tiny_config: Make) -> None:
    model = adapters.attach(load_tiny(), tiny_config(**{"lora.target_modules": "q_proj,v_proj"}))
    assert {name.split(".")[-3] for name in adapters.trainable_state(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="(?s)lora.target_modules.*all-linear.*q_proj"):
        adapters.attach(load_tiny(), tiny_config(**{"lora.target_modules": "nothing"}))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_trainable_state_round_trip(load_tiny: Load, tiny_config: Make, method: str) -> None:
    config = tiny_config(method=method)
    one, other = (adapters.attach(load_tiny(bits=4 if method == "qlora" else 0), config) for _ in range(2))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(one):
            parameter.add_(torch.randn_like(parameter))
    adapters.load_trainable_state(other, adapters.trainable_state(one))
    expected, found = adapters.trainable_state(one), adapters.trainable_state(other)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_of_another_shape_are_refused(load_tiny: Load, tiny_config: Make) -> None:
    small = adapters.attach(load_tiny(), tiny_config())
    large = adapters.attach(load_tiny(), tiny_config(**{"lora.rank": 8}))
    with pytest.raises(CheckpointError, match="lora_A"):
        adapters.load_trainable_state(large, adapters.trainable_state(small))


def test_adapter_config_is_json(load_tiny: Load, tiny_config: Make) -> None:
    config = adapters.adapter_config(adapters.attach(load_tiny(), tiny_config()))
    assert config is not None and json.loads(json.dumps(config)) == config
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (4, 8, "LORA", "CAUSAL_LM")
    assert adapters.adapter_config(load_tiny().model) is None


def test_adapters_stand_beside_each_other(load_tiny: Load, tiny_config: Make, tmp_path: Path) -> None:
    for number in (1, 2):
        model = adapters.attach(load_tiny(), tiny_config())
        for parameter in adapters.trainable_parameters(model):
            torch.nn.init.constant_(parameter, number / 10)
        model.save_pretrained(tmp_path / f"adapter{number}")
    model = adapters.load_adapter(load_tiny().model, tmp_path / "adapter1", "one")
    assert adapters.load_adapter(model, tmp_path / "adapter2", "two") is model
    ids = torch.tensor([[1, 5, 6]])
    outputs = []
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs.append(model(ids).logits)
    assert not torch.allclose(*outputs)
    assert adapters.core_of(model) is model.get_base_model() and adapters.is_adapter(model)


def test_a_folder_without_an_adapter_is_refused(load_tiny: Load, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="adapter_model.safetensors missing"):
        adapters.load_adapter(load_tiny().model, tmp_path, "one")
