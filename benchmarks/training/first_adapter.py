"""The LoRA weights that every tool begins with: A drawn as PEFT draws it, B zero, under the names PEFT saves."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from studio.config.schema import RunConfig
from studio.engine import adapters, devices
from studio.engine.models.load import load_base


def write_adapter(model: Path, path: Path) -> None:
    devices.seed_all(0)
    config = RunConfig()
    loaded = load_base(model, dtype=torch.float32, device=torch.device("cpu"))
    state = adapters.trainable_state(adapters.attach(loaded, config))
    save_file({name: tensor.detach().float().contiguous() for name, tensor in state.items()}, path)
