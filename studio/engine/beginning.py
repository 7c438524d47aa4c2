"""Continue from: a new run whose weights begin as those of an adapter or checkpoint, ours or XTuner's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from studio.checkpoint_files import manifest_path
from studio.conversions import is_foreign
from studio.engine import adapters
from studio.engine.adapter_files import read_adapter
from studio.engine.checkpoint import verify
from studio.engine.foreign import in_our_format
from studio.engine.models.families import layout_of
from studio.engine.zero_folder import read_own
from studio.errors import CheckpointError
from studio.foreign.xtuner import open_checkpoint


def begin(model: nn.Module, path: Path, base_fingerprint: str) -> None:
    """Put the weights at `path` into a model that is ready to train; its optimizer begins anew.

    Raises CheckpointError when they are damaged, of another base, or do not fit the model exactly.
    """
    state, adapter_config, fingerprint = _read(path)
    if fingerprint and fingerprint != base_fingerprint:
        raise CheckpointError(
            f"{path.name} belongs to another base model: it was trained on {fingerprint[:12]}, and the run's base is "
            f"{base_fingerprint[:12]}.",
            "Set model.base to the base that it was trained on.",
        )
    if adapter_config is not None and adapters.is_adapter(model):
        _require_same_strength(model, adapter_config, path)
    layout = layout_of(adapters.core_of(model))
    adapters.load_trainable_state(model, layout.translated(state) if layout else state)


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None, str]:
    """(weights, PEFT's config, fingerprint of the base, empty when nothing says it)."""
    if (path / "adapter_config.json").is_file():
        adapter = read_adapter(path)
        return adapter.tensors, adapter.config, str(adapter.seal.get("base_fingerprint", ""))
    if manifest_path(path).is_file():
        verify(path)
    content = in_our_format(open_checkpoint(path), "") if is_foreign(path) else read_own(path)
    meta, state = content["meta"], content.get("state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path.name} holds no weights.", "Give another checkpoint.")
    return state, meta.get("adapter_config"), str(meta.get("base_fingerprint", ""))


def _require_same_strength(model: nn.Module, theirs: dict[str, Any], path: Path) -> None:
    """An adapter counts by alpha / rank, or its root; by another, the same weights would be another model."""
    ours = adapters.adapter_config(model) or {}
    if _strength(ours) != _strength(theirs):
        raise CheckpointError(
            f"{path.name} has rank, alpha and rsLoRA of {_strength(theirs)}, the run {_strength(ours)}.",
            "Set lora.rank, lora.alpha and lora.rslora to those of the adapter.",
        )


def _strength(adapter: dict[str, Any]) -> tuple[int, float, bool]:
    return int(adapter.get("r") or 0), float(adapter.get("lora_alpha") or 0), bool(adapter.get("use_rslora"))
