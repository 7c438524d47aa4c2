"""LoRA adapters in folders, ours and others': read and checked, without running or importing what they name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.engine.models.families import layout_of
from studio.engine.safe_load import load_pth
from studio.engine.weights import read_seal, weights_hash
from studio.errors import CheckpointError
from studio.paths import sha256_of
from studio.weight_folders import ADAPTER_WEIGHTS, OLD_ADAPTER_WEIGHTS, adapter_config


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder that was read and checked."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    seal: dict[str, Any]

    def for_model(self, model: nn.Module) -> "Adapter":
        """The same by the names of the class that computes the base here, where its family has a layout of its own."""
        layout = layout_of(model)
        targets = self.config.get("target_modules")
        if layout is None or not isinstance(targets, list):
            return self
        config = self.config | {"target_modules": layout.renamed_targets(targets)}
        return replace(self, config=config, tensors=layout.translated(self.tensors))

    @property
    def hash(self) -> str:
        """sha256 of its weights."""
        old = self.folder / OLD_ADAPTER_WEIGHTS
        return weights_hash(self.folder) if (self.folder / ADAPTER_WEIGHTS).is_file() else sha256_of(old)


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter in PEFT's format. Raises CheckpointError, or UnsafeFileError for one that would import code."""
    config = adapter_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / OLD_ADAPTER_WEIGHTS).is_file():
        return Adapter(folder, config, _read_old(folder / OLD_ADAPTER_WEIGHTS), {})
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{ADAPTER_WEIGHTS} in {folder.name!r} is damaged: {error}.", "Convert the checkpoint again."
        ) from error
    return Adapter(folder, config, tensors, read_seal(folder))


def _read_old(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an `adapter_model.bin`, as older tools write it; nothing in it can run."""
    content = load_pth(path)
    if odd := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{path.name} holds {str(odd[0])[:60]!r}, which is no tensor.", "Convert it again.")
    return content
