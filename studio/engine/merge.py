"""`merge`: base + adapter becomes one full model, and is then compared with the pair that it was made from."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from studio.data.talk import Talk, read_talk
from studio.engine.adapter_files import Adapter, read_adapter
from studio.engine.card import model_card, shown_base
from studio.engine.convert import DTYPES
from studio.engine.devices import pick_device, set_threads
from studio.engine.equality import Agreement, compare, make_reference
from studio.engine.folding import attach
from studio.engine.job import JobContext
from studio.engine.models.load import load_base
from studio.engine.weights import (
    Base,
    copy_talk,
    copy_tokenizer,
    known_base,
    output_folder,
    own_dtype,
    require_replaceable,
    seal,
    shard_bytes,
)
from studio.errors import CheckpointError, StudioError
from studio.store import checkpoints as store
from studio.store import open_db

FLOAT32_SHARE = 0.7
"""Compute in float32 when the weights then take at most this share of the memory that is free."""


def run(job: JobContext) -> dict[str, Any]:
    """Args: base, adapter, out; max_shard_size, device, run_id, step, dtype.

    Each layer is folded in float32 and rounded once, to the base's own number format or to `dtype`; with the latter the
    base's weights are rounded to it first, as XTuner does with float16, and the result has the same bits. The model is
    then read back from the disk and held against base + adapter: logits and greedy answers. Where they differ by more
    than the rounding of the weights explains, the result and retune_weights.json say `"verified": false`, with the
    figures.
    Raises CheckpointError for a damaged adapter or one of another base, before anything is written.
    """
    args = job.args
    out, limit = Path(args["out"]), shard_bytes(args.get("max_shard_size") or "2GB")
    require_replaceable(out)
    device = pick_device(args.get("device") or "auto")
    set_threads()
    job.phase("reading the adapter")
    adapter = read_adapter(Path(args["adapter"]))
    base = known_base(str(args["base"]), str(adapter.seal.get("base_fingerprint", "")), "The adapter's weights")
    if out.resolve() in (adapter.folder.resolve(), base.folder.resolve()):
        raise StudioError(f"{str(out)!r} is what the merge is made from.", "Choose another folder for the result.")
    stored = DTYPES[str(args["dtype"])] if args.get("dtype") else own_dtype(base.folder)
    record = merge(job, base, adapter, out, device, limit, stored)
    _register(job, out, record)
    return {key: record[key] for key in ("sha256", "run_id", "step", "verified", "message", "agreement")} | {
        "path": str(out)
    }


def merge(
    job: JobContext,
    base: Base,
    adapter: Adapter,
    out: Path,
    device: torch.device,
    max_shard_bytes: int,
    stored: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write and verify the merged model; returns what its retune_weights.json says."""
    job.phase("loading the base model")
    dtype = _arithmetic(base.folder, device)
    loaded = load_base(base.folder, dtype=dtype, device=device)
    stored = stored or own_dtype(base.folder)
    _round(loaded.model, stored)
    with output_folder(out, loaded.model.num_parameters() * stored.itemsize + 2**24) as folder:
        pair = attach(loaded.model, adapter)
        job.check_stop()
        job.phase("answering with base + adapter")
        reference = make_reference(loaded, pair)
        job.check_stop()
        loaded.model = fold(job, pair)
        folding = compare(loaded, reference, dtype).relative_error if dtype == torch.float32 else None
        job.phase("writing the model")
        loaded.model.to(stored).save_pretrained(folder, max_shard_size=max_shard_bytes)
        copy_tokenizer(base.folder, folder)
        copy_talk(adapter.folder, folder)
        del loaded.model, pair
        gc.collect()
        job.phase("comparing what was written with base + adapter")
        written = compare(load_base(folder, dtype=dtype, device=device), reference, stored)
        agreement = replace(written, folding_error=folding)
        return _seal(folder, base, adapter, agreement)


def fold(job: JobContext, pair: nn.Module) -> nn.Module:
    """Add each layer's update to its weight, in float32, and return the plain model, each weight in its own format."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in pair.named_modules() if isinstance(module, BaseTunerLayer)]
    job.phase("folding the adapter into the base", total=len(layers), unit="layers")
    for number, (name, layer) in enumerate(layers, 1):
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        layer.float()
        layer.merge()
        if not torch.isfinite(weight.data).all():
            raise CheckpointError(f"Folding makes {name} infinite or NaN.", "Use an earlier checkpoint.")
        layer.to(dtype)
        job.progress(number)
    return pair.unload()


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the base to the format that the result is stored in; nothing happens to one that is stored in it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)


def _arithmetic(folder: Path, device: torch.device) -> torch.dtype:
    """float32, so that only the rounding of the weights remains to be seen; the model's own where memory is short."""
    own = own_dtype(folder)
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    needed = sum(path.stat().st_size for path in weights) * 4 / own.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return torch.float32 if needed < free * FLOAT32_SHARE else own


def _seal(folder: Path, base: Base, adapter: Adapter, agreement: Agreement) -> dict[str, Any]:
    made_from = adapter.seal
    values = {
        "kind": "merged",
        "run_id": made_from.get("run_id", ""),
        "step": made_from.get("step", 0),
        "method": made_from.get("method", "lora"),
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "adapter_sha256": adapter.hash,
        "verified": agreement.verified,
        "message": agreement.message,
        "agreement": agreement.figures(),
        "talk": (read_talk(adapter.folder) or Talk()).to_row(),
    }
    facts = {key.replace("_", " "): value for key, value in values.items() if key not in ("kind", "talk")}
    facts["base"] = shown_base(base.name)
    title = f"{values['run_id'] or adapter.folder.name}, merged"
    return seal(folder, model_card(title, base=base.name, is_adapter=False, facts=facts), values)


def _register(job: JobContext, out: Path, record: dict[str, Any]) -> None:
    root, place = job.folder.resolve(), out.resolve()
    if root not in place.parents or not (job.folder / "project.json").is_file():
        return
    run_id = str(job.args.get("run_id") or record["run_id"])
    step = int(job.args.get("step") or record["step"])
    detail = {key: record[key] for key in ("sha256", "verified", "message", "agreement")}
    with open_db(job.folder) as db:
        store.put_output(db, store.Output("merged", str(place.relative_to(root)), run_id, step, detail))
