"""What learns: every weight, a LoRA adapter on a frozen (perhaps 4-bit) base, or virtual tokens before it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from studio.config.schema import LoraSection, RunConfig
from studio.engine.adapter_files import read_adapter
from studio.engine.models.families import layout_of
from studio.engine.models.load import LoadedModel
from studio.errors import CheckpointError, ConfigError, ModelError, Problem

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def attach(loaded: LoadedModel, config: RunConfig) -> nn.Module:
    """Make `loaded.model` trainable as the config's method says and return the module to train.

    Trainable weights are float32 whatever the base's dtype. Raises ConfigError for target modules that are not there.
    """
    if config.method == "full":
        return loaded.model.requires_grad_(True).float()
    loaded.model.requires_grad_(False)
    try:
        return get_peft_model(loaded.model, _peft_config(config, loaded.model))
    except ValueError as error:
        names = ", ".join(_linear_names(loaded.model))
        raise ConfigError(
            [Problem("lora.target_modules", f"{' '.join(str(error).split())[:200]}", f"all-linear, or {names}")],
            config.name,
        ) from error


def is_adapter(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)


def core_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, adapter layers included; or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, under the names that PEFT (adapters) or transformers (full) saves."""
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return dict(model.state_dict())


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put saved weights into a model of the same shape. Raises CheckpointError when any is missing or does not fit."""
    expected = {name: tensor.shape for name, tensor in trainable_state(model).items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise CheckpointError(
            f"The checkpoint's weights do not fit this model (first difference: {odd}).",
            "Resume with the config and the base model that it was trained with.",
        )
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(state))
    else:
        model.load_state_dict(state)


def adapter_config(model: nn.Module) -> dict[str, Any] | None:
    """PEFT's LoraConfig as plain JSON values; None for full training."""
    if not isinstance(model, PeftModel):
        return None
    values = model.peft_config["default"].to_dict()
    return json.loads(json.dumps(values, default=_plain))


def load_adapter(model: nn.Module, folder: Path, name: str) -> PeftModel:
    """Put a LoRA adapter of a folder beside those that `model` has, under `name`. Raises ModelError.

    Only safetensors are read. Returns the PEFT model: `model` itself when it was one already.
    """
    folder = Path(folder)
    if missing := [file for file in ADAPTER_FILES if not (folder / file).is_file()]:
        raise ModelError(
            f"The folder {str(folder)!r} is not an adapter: {', '.join(missing)} missing.",
            "Convert the checkpoint first; that makes such a folder.",
        )
    try:
        if layout_of(core_of(model)):
            return _load_translated(model, folder, name)
        if isinstance(model, PeftModel):
            _require_same_kind(model, folder)
            model.load_adapter(str(folder), adapter_name=name, use_safetensors=True)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"The adapter in {str(folder)!r} does not fit this base: {' '.join(str(error).split())[:300]}",
            "Use it with the base model that it was trained on.",
        ) from error


def take_off(model: PeftModel, name: str) -> nn.Module:
    """Delete an adapter. Returns the model, after the last one the bare base: PEFT's wrapper cannot wear none."""
    if set(model.peft_config) != {name}:
        model.delete_adapter(name)
        return model
    core = core_of(model)
    if isinstance(model.base_model, BaseTuner):
        model.base_model.delete_adapter(name)  # without it, `unload` leaves modules that the adapter brought whole
        model.base_model.unload()
    return core


def _load_translated(model: nn.Module, folder: Path, name: str) -> PeftModel:
    """An adapter on a family with a layout of its own: by whichever names it comes, it finds its layers."""
    adapter = read_adapter(folder).for_model(core_of(model))
    config = LoraConfig.from_peft_type(**adapter.config)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = PeftModel(model, config, adapter_name=name)
    result = set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"{result.unexpected_keys[0]} has no place there")
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """In a fixed order; weights that are tied come once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learning_rate_factors(model: nn.Module, config: RunConfig) -> dict[nn.Parameter, float]:
    """LoRA+: the factor on the learning rate of each B matrix; empty where all weights learn at one rate."""
    factor = config.lora.plus_ratio
    if factor == 1 or config.method not in ("lora", "qlora"):
        return {}
    learning = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
    return {each: factor for name, each in learning if "lora_B" in name}


def _require_same_kind(model: PeftModel, folder: Path) -> None:
    """PEFT puts adapters of one kind on a base. Raises ModelError."""
    kind = PeftConfig.from_pretrained(str(folder)).peft_type
    if kind != model.peft_type:
        raise ModelError(
            f"The base wears {model.peft_type.value} adapters, {folder.name!r} is {kind.value}: kinds cannot be mixed.",
            "Load them one after the other: stop the model server, or score them in two goes.",
        )


def _peft_config(config: RunConfig, model: nn.Module) -> PeftConfig:
    if config.method == "prompt_tuning":
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.prompt.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",  # RANDOM begins tens of times longer than any token's embedding
        )
    if config.method == "prefix_tuning":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.prompt.num_virtual_tokens)
    return _lora_config(config.lora, _targets(config.lora.target_modules, model))


def _targets(names: str, model: nn.Module) -> str | list[str]:
    """The layers that get an adapter, as they are called in the model; those that it has not are told of in the log.

    Of a mixture's experts transformers keeps one weight for all, which PEFT would take for w1, w2 and w3, and refuse
    with dropout; XTuner's configs name them.
    """
    if names == "all-linear":
        return names
    wanted, layout = names.split(","), layout_of(model)
    wanted = layout.renamed_targets(wanted) if layout else wanted
    there = [name for name in wanted if any(f".{each}".endswith(f".{name}") for each, _ in model.named_modules())]
    if there and (missing := sorted(set(wanted) - set(there))):
        print(f"The model has no layer {', '.join(missing)}: nothing there gets an adapter.", flush=True)
    return there or wanted


def _lora_config(lora: LoraSection, targets: str | list[str]) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of linear layers, as `target_modules` takes them."""
    return sorted({name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)})


def _plain(value: Any) -> Any:
    """JSON form of what PEFT keeps in a config: sets, enums, dtypes."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
