"""What a new run may continue from: an adapter folder, or a checkpoint of ours or XTuner's. Looked at without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.config.schema import RunConfig, parse_config
from studio.errors import CheckpointError, ConfigError, Problem
from studio.foreign.torch_file import open_dictionary
from studio.foreign.xtuner import open_checkpoint
from studio.paths import typed_path
from studio.weight_folders import ADAPTER_CONFIG

ADAPTER_METHODS = ("lora", "qlora")
NOT_TRAINED_HERE = ("modules_to_save", "rank_pattern", "alpha_pattern")
ALLOWED = "An adapter folder in PEFT's format, a .pth, or a folder of DeepSpeed."


@dataclass(frozen=True)
class Beginning:
    """Weights at `path`; `adapter` is PEFT's config of an adapter, None for weights of a full model."""

    path: Path
    adapter: dict[str, Any] | None


def look(path: Path) -> Beginning:
    """What lies at a path. Raises CheckpointError when it is nothing to continue from."""
    if (path / ADAPTER_CONFIG).is_file():
        return Beginning(path, _adapter_config(path))
    if path.is_dir() and (path / "config.json").is_file():
        raise CheckpointError(f"{str(path)!r} is a whole model.", "Make it the run's base model: model.base.")
    if path.is_dir():
        return _of_xtuner(path)
    meta = open_dictionary(path).content.get("meta")
    if isinstance(meta, dict) and "format" in meta:
        config = meta.get("adapter_config")
        return Beginning(path, config if isinstance(config, dict) else None)
    return _of_xtuner(path)


def fitting(config: RunConfig) -> RunConfig:
    """The config with the adapter's shape that its beginning has, and its whole path; as it is when it continues from
    nothing.

    Raises ConfigError when method and weights do not go together.
    """
    if not config.model.continue_from:
        return config
    path = typed_path(config.model.continue_from).resolve()
    found = look(path)
    if (found.adapter is None) != (config.method == "full"):
        kind = "an adapter" if found.adapter is not None else "weights of a full model"
        allowed = "lora or qlora; or merge the adapter and make the result the base" if found.adapter else "full"
        raise ConfigError([Problem("method", f"is {config.method}, and {found.path.name} holds {kind}", allowed)])
    values = config.model_dump(mode="json")
    values["model"]["continue_from"] = str(path)
    if found.adapter is not None:
        values["lora"] |= _shape(found)
    return parse_config(values, config.name)


def _shape(found: Beginning) -> dict[str, Any]:
    """Rank, alpha, layers and kind of an adapter as a config has them. Raises CheckpointError for what it has not."""
    adapter = found.adapter or {}
    odd = [name for name in NOT_TRAINED_HERE if adapter.get(name)]
    if adapter.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise CheckpointError(
            f"The adapter {found.path.name} has {odd[0]}, which training does not have here.",
            "Merge it into its base, and train a new adapter on the result.",
        )
    targets, alpha = adapter.get("target_modules"), adapter.get("lora_alpha")
    if not isinstance(alpha, int | float) or alpha != int(alpha) or not isinstance(adapter.get("r"), int):
        raise CheckpointError(f"The adapter {found.path.name} has no whole r and lora_alpha.", ALLOWED)
    names = targets if isinstance(targets, str) else ",".join(sorted(targets or []))
    kinds = {"dora": bool(adapter.get("use_dora")), "rslora": bool(adapter.get("use_rslora"))}
    return {"rank": adapter["r"], "alpha": int(alpha), "target_modules": names, **kinds}


def _of_xtuner(path: Path) -> Beginning:
    found = open_checkpoint(path)
    return Beginning(path, found.adapter_config() if found.is_adapter else None)


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{ADAPTER_CONFIG} in {folder.name!r} cannot be read: {error}.", ALLOWED) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder.name!r} holds no LoRA adapter.", ALLOWED)
    return config
