"""`layout`: a model of a family that is Llama underneath, as transformers' own class, or back under its own names."""

import json
import shutil
from pathlib import Path
from typing import Any

from studio.conversions import check_layout
from studio.engine.convert import write_model
from studio.engine.job import JobContext
from studio.engine.models.families import Native, native, read_native
from studio.engine.split import read_shard
from studio.engine.weights import Base, copy_tokenizer, own_dtype
from studio.errors import ModelError
from studio.models import model_files
from studio.paths import atomic_path, atomic_write_json, require_free_space
from studio.weight_folders import DEFAULT_SHARD_SIZE, shard_bytes, weight_files

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")


def run(job: JobContext) -> dict[str, Any]:
    """Args: source (a model folder), out (not there yet), own ("" for transformers' class, else the folder of the
    family whose layout is wanted; its Python files are copied and not run). Raises ModelError.
    """
    check_layout(job.folder, job.args)
    source, out, own = Path(job.args["source"]), Path(job.args["out"]), str(job.args.get("own") or "")
    found = native(Path(own) if own else source)
    if found is None:
        raise ModelError(
            f"{Path(own or source).name!r} has no layout of its own: transformers knows it as it is.",
            "Give a folder of InternLM2, InternLM, Baichuan 7B or Qwen.",
        )
    shards, _ = weight_files(source)
    require_free_space(out, sum(path.stat().st_size for path in shards) + 2**24, f"the model {out.name}")
    job.phase("writing the model")
    with atomic_path(out) as temporary:
        temporary.mkdir()
        if own:
            _write_own(temporary, source, Path(own), found)
        else:
            _write_native(temporary, source, found)
    return {"path": str(out), "family": found.family.name}


def _write_native(folder: Path, source: Path, found: Native) -> None:
    tensors = read_native(source, found, own_dtype(source))
    base = Base(source.name, source, "here", str(source))
    write_model(folder, base, tensors, shard_bytes(DEFAULT_SHARD_SIZE), source.name)
    copy_tokenizer(source, folder)


def _write_own(folder: Path, source: Path, own: Path, found: Native) -> None:
    from huggingface_hub import save_torch_state_dict

    shards, _ = weight_files(source)
    tensors = found.own_state({name: tensor for shard in shards for name, tensor in read_shard(shard)})
    save_torch_state_dict(
        {name: each.contiguous() for name, each in tensors.items()}, folder, max_shard_size=DEFAULT_SHARD_SIZE
    )
    for path in model_files(own):
        if not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)
    embedding = tensors[
        next(theirs for theirs in (*found.family.outer, "model.embed_tokens.weight") if theirs in tensors)
    ]
    values = json.loads((own / "config.json").read_text(encoding="utf-8"))
    atomic_write_json(folder / "config.json", values | {"vocab_size": embedding.shape[0]})
