"""Folders of weights, looked at without torch: which files are in one, and whether one may be written where it lies."""

import json
import re
from pathlib import Path
from typing import Any

from studio.data.talk import GATE_FILE, WEIGHTS_FILE
from studio.errors import CheckpointError, ModelError, StudioError, UnsafeFileError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_ADAPTER_WEIGHTS = "adapter_model.bin"
# Settings of an adapter that name Python modules to import; ours never have them.
IMPORTING_SETTINGS = ("auto_mapping", "megatron_config", "megatron_core")
VIRTUAL_KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")
INDEXES = {"model.safetensors": "safetensors", "pytorch_model.bin": "bin"}
DEFAULT_SHARD_SIZE = "2GB"  # of one file of weights
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA adapter whose weights are there too.

    Raises CheckpointError for another kind or a missing file, UnsafeFileError for one that would import code.
    """
    config = _read_adapter_config(folder)
    if not any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, OLD_ADAPTER_WEIGHTS)):
        raise CheckpointError(
            f"{folder.name!r} has no {ADAPTER_WEIGHTS}.", "Give a folder made by convert, or one with safetensors."
        )
    return config


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
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


def weight_files(folder: Path) -> tuple[list[Path], str]:
    """The weight files of a model folder, and whether they are `safetensors` or `bin`. Raises ModelError."""
    for stem, kind in INDEXES.items():
        if (folder / f"{stem}.index.json").is_file():
            return _listed(folder, f"{stem}.index.json"), kind
        if (folder / stem).is_file():
            return [folder / stem], kind
    raise ModelError(f"{str(folder)!r} holds no weights.", f"A model folder has one of {', '.join(INDEXES)}.")


def _listed(folder: Path, index: str) -> list[Path]:
    try:
        names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} in {folder.name!r} cannot be read: {error!r}.", "Copy the model again.") from error
    if missing := [path.name for path in paths if path.parent != folder or not path.is_file()]:
        raise ModelError(f"{folder.name!r} lacks {missing[0]}.", "Copy the model again.")
    return paths


def shard_bytes(size: str) -> int:
    """Bytes of a size such as 2GB or 500MB. Raises StudioError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", str(size), re.IGNORECASE)
    num_bytes = int(float(found[1]) * SIZE_UNITS[found[2].upper()]) if found else 0
    if num_bytes < 1000:
        raise StudioError(f"{size!r} is no size for a weights file.", "Write a number and a unit: 500MB, 2GB.")
    return num_bytes


def require_replaceable(out: Path) -> None:
    """Raise StudioError when `out` holds something that did not come from convert or merge."""
    if not out.exists():
        return
    hint = "Choose a folder that does not exist yet."
    if not out.is_dir():
        raise StudioError(f"{str(out)!r} is a file, not a folder.", hint)
    there = {path.name for path in out.iterdir()}
    records = (WEIGHTS_FILE, GATE_FILE)
    ours = {name for record in records for name in (record, *_files_of(out / record))}
    if strange := sorted(there - ours):
        raise StudioError(
            f"{str(out)!r} holds {strange[0]!r}, which this command did not make; it was not touched.", hint
        )


def _files_of(record: Path) -> list[str]:
    """The files that a record of ours lists; none where it is damaged, so that they count as another's."""
    files = json_object(record).get("files")
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []


def require_free(out: Path, overwrite: bool) -> None:
    """Raise StudioError when something lies at `out` that is not to be replaced; an empty folder is nothing."""
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty and not overwrite:
        raise StudioError(f"{out.name!r} is there already; it was not touched.", "Choose another name, or --overwrite.")


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} when the file is missing or is something else: then we did not write it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
