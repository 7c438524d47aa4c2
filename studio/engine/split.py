"""`split`: a model folder with one file a tensor, as XTuner's `convert split` cuts one, for tools that read it so."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from studio.conversions import check_split
from studio.engine.job import JobContext
from studio.engine.safe_load import load_pth
from studio.errors import CheckpointError, ModelError
from studio.models import model_files
from studio.paths import atomic_path, atomic_write_json, require_free_space
from studio.weight_folders import INDEXES, weight_files

NAMES = {"safetensors": "model-{:05d}-of-{:05d}.safetensors", "bin": "pytorch_model-{:05d}-of-{:05d}.bin"}
MAX_TENSORS = 99_999


def run(job: JobContext) -> dict[str, Any]:
    """Args: source (a model folder), out (a folder that is not there yet).

    Weights keep their format (safetensors, or `.bin` files as XTuner writes them) and every bit; all other files are
    copied. Raises ModelError when the source is no model, CheckpointError for damaged weights.
    """
    check_split(job.folder, job.args)
    source, out = Path(job.args["source"]), Path(job.args["out"])
    shards, kind = weight_files(source)
    require_free_space(out, sum(path.stat().st_size for path in shards) + 2**24, f"the model {out.name}")
    num_tensors = sum(1 for shard in shards for _ in _names(shard))
    if num_tensors > MAX_TENSORS:
        raise ModelError(f"{source.name!r} has {num_tensors} tensors.", f"Allowed: {MAX_TENSORS}.")
    job.phase("writing one file a tensor", total=num_tensors, unit="tensors")
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for path in model_files(source):
            if path not in shards and not path.name.endswith((".index.json", *NAMES)):
                shutil.copyfile(path, temporary / path.name)
        weight_map, num_bytes = {}, 0
        for number, (name, tensor) in enumerate(_tensors(shards), 1):
            weight_map[name] = NAMES[kind].format(number, num_tensors)
            _save(name, tensor, temporary / weight_map[name])
            num_bytes += tensor.nbytes
            job.progress(number)
        index = next(f"{stem}.index.json" for stem, each in INDEXES.items() if each == kind)
        atomic_write_json(temporary / index, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    return {"path": str(out), "tensors": num_tensors, "bytes": num_bytes}


def _tensors(shards: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor after the other, file by file, by name in each, as XTuner numbers them."""
    for shard in shards:
        yield from read_shard(shard)


def read_shard(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a weight file, sorted by name; nothing in it can run."""
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path)
    else:
        content = load_pth(path)
        for name in sorted(content):
            yield name, content[name]


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}.", "Copy the model again.") from error


def _names(path: Path) -> list[str]:
    return [name for name, _ in read_shard(path)]


def _save(name: str, tensor: torch.Tensor, path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous()}, path, {"format": "pt"})
    else:
        torch.save({name: tensor.clone()}, path)  # a clone, so that the file does not hold the whole shard's storage
