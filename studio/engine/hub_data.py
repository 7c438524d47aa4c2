"""Data sets of the Hugging Face hub and of ModelScope as rows, through their libraries. No code of a data set runs."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from studio.data.intake import HUB_PREFIXES
from studio.data.rows import RawRow
from studio.data.tables import raw_row
from studio.errors import DataError
from studio.paths import typed_path

LOCAL = ("/", ".", "~")  # how a folder begins that no id can be taken for
SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def hub_rows(
    source: str, split: str, subset: str, cache: Path, progress: Callable[[int, int], None]
) -> Iterator[RawRow]:
    """Rows of `hf:owner/name`, `modelscope:owner/name`, or of a local folder in either's layout after the prefix.

    `split` is one of the data set's ("train"), `subset` its configuration ("" for the only one). `progress` gets rows
    done and rows in all, 0 where that is not known. Raises DataError with the next move.
    """
    prefix = next((each for each in HUB_PREFIXES if source.startswith(each)), "")
    if not prefix:
        raise DataError(f"{source!r} names no hub.", "Write hf:owner/name or modelscope:owner/name.")
    name = source.removeprefix(prefix)
    folder = typed_path(name)
    if not (name.startswith(LOCAL) and folder.is_dir()):
        _require_id(name, prefix)
        folder = _from_modelscope(name, cache) if prefix == "modelscope:" else Path()
    try:
        found = _load(str(folder) if folder.name else name, split, subset)
        yield from _rows(found, progress)
    except DataError:
        raise
    except Exception as error:  # datasets and huggingface_hub raise many kinds, for the network and for the data
        raise DataError(
            f"{source}, split {split!r} cannot be read: {type(error).__name__}: {str(error)[:400]}.",
            "Check the id, the split and the subset; for a private data set set HF_TOKEN; offline, give a folder.",
        ) from error


def _require_id(name: str, prefix: str) -> None:
    parts = name.split("/")
    if len(parts) > 2 or not all(part and part not in (".", "..") for part in parts):
        raise DataError(f"{name!r} is no folder and no id.", f"Write {prefix}owner/name, or {prefix}./folder.")


def _load(name: str, split: str, subset: str) -> Any:
    from datasets import load_dataset, load_from_disk

    if any((Path(name) / mark).is_file() for mark in SAVED_TO_DISK):
        saved = load_from_disk(name)
        if not isinstance(saved, dict):
            return saved
        if split not in saved:
            raise DataError(f"{name!r} has no split {split!r}.", f"Its splits: {', '.join(saved)}.")
        return saved[split]
    return load_dataset(name, name=subset or None, split=split, streaming=True)


def _rows(found: Any, progress: Callable[[int, int], None]) -> Iterator[RawRow]:
    """Images and sounds stay as they are stored: nothing is decoded."""
    info = found.info.splits or {}
    total = len(found) if hasattr(found, "__len__") else getattr(info.get(str(found.split)), "num_examples", 0) or 0
    plain_rows = found.decode(False) if hasattr(found, "decode") and found.features else found
    for number, row in enumerate(plain_rows, start=1):
        progress(number, total)
        yield raw_row(number, row)


def _from_modelscope(name: str, cache: Path) -> Path:
    """Download a data set's files; read as a folder they need none of ModelScope's own readers."""
    if importlib.util.find_spec("modelscope_hub") is None:
        raise DataError(
            "Data sets of ModelScope need the package `modelscope`, which is not installed.",
            'Install it with `pip install "retune[modelscope]"` and try again.',
        )
    from modelscope_hub.compat.snapshot_download import dataset_snapshot_download

    try:
        return Path(dataset_snapshot_download(name, local_dir=str(cache / name.replace("/", "--"))))
    except Exception as error:  # the library raises many kinds for the network
        raise DataError(
            f"ModelScope's {name!r} cannot be downloaded: {type(error).__name__}: {str(error)[:400]}.",
            "Check the id and the network; offline, give a folder.",
        ) from error
