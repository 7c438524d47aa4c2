"""Reading `.pth` files that may come from anyone: nothing in them runs, and damage is named before it is used."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from studio.errors import UNREADABLE_ZIP, CheckpointError, UnsafeFileError
from studio.foreign.pickles import NEXT_MOVE
from studio.foreign.torch_file import not_a_zip


def load_pth(path: Path, map_location: str | torch.device = "cpu", mmap: bool = True) -> dict[str, Any]:
    """The dictionary in a `.pth` file; tensors, numbers, text and plain containers only.

    Raises UnsafeFileError when loading would run code, CheckpointError when the file is missing, damaged (every
    member's checksum is compared) or something else than a dictionary saved by torch.
    """
    path = Path(path)
    _require_sound_zip(path)
    try:
        content = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {_short(error)}.", NEXT_MOVE) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds {type(content).__name__}, not a checkpoint.", NEXT_MOVE)
    return content


def _require_sound_zip(path: Path) -> None:
    """Compare every member with its CRC-32: torch itself notices neither a flipped bit nor a page of zeros."""
    if path.is_dir():
        raise CheckpointError(
            f"{path.name} is a folder, as DeepSpeed writes them, and not a `.pth` file.", "Give a single `.pth` file."
        )
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r}.", "`retune runs list` shows the checkpoints there are.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path.name} is empty.", NEXT_MOVE)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            _require_one_pickle(path, archive.namelist())
    except UNREADABLE_ZIP as error:
        raise not_a_zip(path, error) from error
    if damaged is not None:
        raise CheckpointError(f"{path.name} is damaged: {damaged} does not have its checksum.", NEXT_MOVE)


def _require_one_pickle(path: Path, names: list[str]) -> None:
    """Two pickles, or TorchScript code, are tricks against scanners; our files and torch.save's have neither."""
    if len(names) != len(set(names)) or sum(name.endswith("data.pkl") for name in names) != 1:
        raise UnsafeFileError(f"{path.name} does not have exactly one data.pkl; it was not opened.", NEXT_MOVE)


def _unsafe(path: Path, error: Exception) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path.name} holds more than tensors and plain values, so opening it could run code; it was not opened "
        f"({_short(error)}).",
        "Take weights from a source that saves tensors only, such as safetensors.",
    )


def _short(error: Exception) -> str:
    """What stands in the way, without torch's advice to load unsafely, which is never the next move."""
    text = " ".join(str(error).split()) or type(error).__name__
    refused = re.search(r"GLOBAL (\S+)", text)
    return f"it calls for {refused[1]}" if refused else text.split(". ")[0][:160]
