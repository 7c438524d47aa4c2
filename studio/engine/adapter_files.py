"""LoRA adapters in folders, ours and others': read and checked, without running or importing what they name."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.engine.models.families import layout_of
from studio.engine.safe_load import load_pth
from studio.engine.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_seal, weights_hash
from studio.errors import CheckpointError, UnsafeFileError
from studio.paths import sha256_of

OLD_ADAPTER_WEIGHTS = "adapter_model.bin"
# Settings of an adapter that name Python modules to import; ours never have them.
IMPORTING_SETTINGS = ("auto_mapping", "megatron_config", "megatron_core")
VIRTUAL_KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")


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
    config = _read_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / OLD_ADAPTER_WEIGHTS).is_file():
        return Adapter(folder, config, _read_old(folder / OLD_ADAPTER_WEIGHTS), {})
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder.name!r} has no {ADAPTER_WEIGHTS}.", "Give a folder made by convert, or one with safetensors."
        )
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(folder)!r} is not an adapter: it has no {ADAPTER_CONFIG}.", "Give a folder that convert made."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{ADAPTER_CONFIG} in {folder.name!r} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        if kind in VIRTUAL_KINDS:
            raise CheckpointError(
                f"{folder.name!r} holds virtual tokens ({kind}): they stand before every text and change no weight of "
                "the base, so there is nothing to merge.",
                "Use it as an adapter: chat and serve load it beside the base. Only LoRA can be merged.",
            )
        raise CheckpointError(f"{folder.name!r} holds a {kind} adapter, which cannot be merged.", "Allowed: LORA.")
    if asking := [name for name in IMPORTING_SETTINGS[:2] if config.get(name)]:
        raise UnsafeFileError(
            f"{ADAPTER_CONFIG} in {folder.name!r} asks to import a module ({asking[0]}); it was not loaded.",
            f"Remove {asking[0]} if you trust the adapter.",
        )
    return config
