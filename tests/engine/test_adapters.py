"""What of a model learns, how it is saved, and how adapters come back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from studio.config.schema import RunConfig
from studio.data.tokens import Example
from studio.engine import adapters
from studio.engine.fused import unfuse
from studio.engine.loop import Trainer
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


@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}], ids=str)
def test_options_of_lora_are_pefts(load_tiny: Load, tiny_config: Make, tmp_path: Path, options: dict) -> None:
    """They are trained, saved, and mean the same to plain PEFT."""
    torch.manual_seed(0)
    config = tiny_config(lora={"rank": 4, "alpha": 8, **options})
    model = adapters.attach(load_tiny(), config)
    trainer = Trainer(model, config, torch.float32, 8, 0)
    example = Example([5, 9, 30, 41, 7, 8], [-100, -100, 30, 41, 7, 8])
    first = trainer.evaluate([example])
    for number in range(1, 5):
        trainer.step([example], number)
    last = trainer.evaluate([example])
    assert last < first - 0.1
    written = adapters.adapter_config(model)
    assert written and written["use_dora"] == bool(options.get("dora"))
    assert written["use_rslora"] == bool(options.get("rslora"))
    unfuse(model)
    model.save_pretrained(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(load_tiny().model, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        logits = alone(input_ids=ids).logits[0, :-1]
    assert float(cross_entropy(logits, torch.tensor(example.labels[1:]))) == pytest.approx(last, rel=1e-4)


def test_lora_plus_lets_the_second_matrix_learn_faster(load_tiny: Load, tiny_config: Make) -> None:
    config = tiny_config(lora={"rank": 4, "alpha": 8, "plus_ratio": 16})
    model = adapters.attach(load_tiny(), config)
    trainer = Trainer(model, config, torch.float32, 8, 0)
    example = Example([5, 9, 30, 41], [-100, 9, 30, 41])
    trainer.step([example], 2)
    rates = {id(each): group["lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    learning = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    assert len(rates) == len(learning)
    for name, each in learning:
        assert rates[id(each)] == pytest.approx(0.01 * (16 if "lora_B" in name else 1)), name
    state = trainer.optimizer.state_dict()
    other = Trainer(adapters.attach(load_tiny(), config), config, torch.float32, 8, 0)
    other.optimizer.load_state_dict(state)
    assert [group["lr_factor"] for group in other.optimizer.param_groups] == [1.0, 16.0]
    assert adapters.learning_rate_factors(model, tiny_config()) == {}
