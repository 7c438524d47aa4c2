"""`merge`: base + adapter becomes one full model, and is then compared with the pair that it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from studio.conversions import ONTO, check_merge, number_format
from studio.data.talk import GATE_FILE, Talk, read_talk
from studio.engine.adapter_files import Adapter, read_adapter
from studio.engine.card import model_card, shown_base
from studio.engine.devices import DTYPES, pick_device, set_threads
from studio.engine.equality import TOLERANCE
from studio.engine.equivalence import Verdict, expected_of, folding_error, verdict_of_folder, weigh_folder
from studio.engine.folding import FoldedWeights, LoadedWeights, fill
from studio.engine.job import JobContext
from studio.engine.lineage import lineage_of
from studio.engine.models.load import load_base
from studio.engine.weights import (
    Base,
    copy_talk,
    copy_tokenizer,
    known_base,
    output_folder,
    own_dtype,
    save_tensors,
    seal,
)
from studio.machine import versions
from studio.paths import atomic_write_json
from studio.store import checkpoints as store
from studio.store import open_db
from studio.weight_folders import DEFAULT_SHARD_SIZE, require_free, shard_bytes

NOT_ON_THE_CARD = ("kind", "talk", "data_fingerprints", "agreement", "weights")
FLOAT32_SHARE = 0.7
"""Compute in float32 when the weights then take at most this share of the memory that is free."""


@dataclass(frozen=True)
class Form:
    """How a merged model is written. `onto` as in ONTO; `overwrite` lets it take the place of an older one."""

    dtype: torch.dtype
    max_shard_bytes: int
    onto: str = "base"
    overwrite: bool = False

    @property
    def bits(self) -> int:
        """Of the base that it is held against."""
        return 4 if self.onto == "dequantised" else 0


def run(job: JobContext) -> dict[str, Any]:
    """Args: base, adapter, out; max_shard_size, device, run_id, step, dtype, onto, overwrite.

    Each layer is folded in float32 and rounded once, to the base's own number format or to `dtype`; with the latter the
    base's weights are rounded to it first, as XTuner does with float16, and the result has the same bits. Weights are
    read, folded and written one after the other. The model is then read back from the disk and held against base +
    adapter: prompts, logits and greedy answers. Where they differ by more than the rounding of the weights explains,
    the result, gate.json and retune_weights.json say so, with the figures.
    Raises CheckpointError for a damaged adapter or one of another base, before anything is written.
    """
    check_merge(job.folder, job.args)
    args = job.args
    out = Path(args["out"])
    device = pick_device(args.get("device") or "auto")
    set_threads()
    job.phase("reading the adapter")
    adapter = read_adapter(Path(args["adapter"]))
    base = known_base(str(args["base"]), str(adapter.seal.get("base_fingerprint", "")), "The adapter's weights")
    record = merge(job, base, adapter, out, device, form_of(args, base))
    register(job, out, record)
    told = ("sha256", "run_id", "step", "verified", "message", "agreement", "onto")
    return {key: record[key] for key in told} | {"path": str(out)}


def form_of(args: Mapping[str, Any], base: Base) -> Form:
    """From the arguments of a job. Raises StudioError, naming what is allowed."""
    name, onto = number_format(args), str(args.get("onto") or "base")
    dtype = DTYPES[name] if name else own_dtype(base.folder)
    return Form(dtype, shard_bytes(args.get("max_shard_size") or DEFAULT_SHARD_SIZE), onto, bool(args.get("overwrite")))


def merge(job: JobContext, base: Base, adapter: Adapter, out: Path, device: torch.device, form: Form) -> dict[str, Any]:
    """Write and verify the merged model; returns what its retune_weights.json says."""
    require_free(out, form.overwrite)
    weights = FoldedWeights(base.folder, adapter, rounded_to=form.dtype, squeezed=form.bits == 4)
    num_bytes = sum(shape.numel() for shape in weights.shapes.values()) * form.dtype.itemsize
    with output_folder(out, num_bytes + 2**24) as folder:
        write_model(job, folder, weights, base, adapter, form)
        copy_tokenizer(base.folder, folder)
        copy_talk(adapter.folder, folder)
        verdict = check(job, folder, base, adapter, device, form)
        atomic_write_json(folder / GATE_FILE, verdict.to_row() | {"onto": form.onto})
        return _seal(job, folder, base, adapter, verdict, form)


def write_model(
    job: JobContext, folder: Path, weights: FoldedWeights, base: Base, adapter: Adapter, form: Form
) -> None:
    """config.json and the weights, no more of them in memory than one file holds."""
    if not weights.is_streamable:
        return _write_whole(job, folder, base, adapter, form)
    weights.config.dtype, weights.config.architectures = form.dtype, [weights.architecture]
    weights.config.save_pretrained(folder)
    hollow = {name: torch.empty(shape, dtype=form.dtype, device="meta") for name, shape in weights.shapes.items()}
    plan = split_torch_state_dict_into_shards(hollow, max_shard_size=form.max_shard_bytes)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        atomic_write_json(folder / "model.safetensors.index.json", index)
    job.phase("folding the adapter into the base", total=len(hollow), unit="tensors")
    done = 0
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = weights.read(name).to(form.dtype)
            job.progress(done := done + 1)
        save_tensors(tensors, folder / file)
        job.check_stop()
    return None


def _write_whole(job: JobContext, folder: Path, base: Base, adapter: Adapter, form: Form) -> None:
    """For architectures whose files name the weights otherwise than transformers: through the model in memory."""
    job.phase("loading the base model")
    model = load_base(base.folder, dtype=form.dtype, device=torch.device("cpu")).model
    weights = FoldedWeights(base.folder, adapter, squeezed=form.bits == 4, loaded=LoadedWeights(model))
    job.phase("folding the adapter into the base")
    fill(model, weights)
    model.save_pretrained(folder, max_shard_size=form.max_shard_bytes)


def check(job: JobContext, folder: Path, base: Base, adapter: Adapter, device: torch.device, form: Form) -> Verdict:
    """Hold the written folder against base + adapter; one model is in memory at a time."""
    dtype = _arithmetic(base.folder, device)
    job.phase("answering with base + adapter")
    expected = expected_of(base.folder, adapter, dtype, device, bits=form.bits).reference
    job.check_stop()
    job.phase("comparing what was written with base + adapter")
    squeezed = form.bits == 4
    folding = folding_error(base.folder, adapter, expected, device, squeezed) if dtype == torch.float32 else None
    tolerance = TOLERANCE.get(form.dtype, TOLERANCE[torch.bfloat16])
    verdict = verdict_of_folder(folder, expected, dtype, device, tolerance)
    weighed = weigh_folder(folder, FoldedWeights(base.folder, adapter, form.dtype, squeezed), form.dtype)
    return replace(verdict, agreement=replace(verdict.agreement, folding_error=folding), weights=weighed)


def _arithmetic(folder: Path, device: torch.device) -> torch.dtype:
    """float32, so that only the rounding of the weights remains to be seen; the model's own where memory is short."""
    own = own_dtype(folder)
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    needed = sum(path.stat().st_size for path in weights) * 4 / own.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return torch.float32 if needed < free * FLOAT32_SHARE else own


def _seal(job: JobContext, folder: Path, base: Base, adapter: Adapter, verdict: Verdict, form: Form) -> dict[str, Any]:
    made_from = adapter.seal
    values = {
        "kind": "merged",
        "run_id": made_from.get("run_id", ""),
        "step": made_from.get("step", 0),
        "method": made_from.get("method", "lora"),
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "adapter_sha256": adapter.hash,
        "number_format": str(form.dtype).removeprefix("torch."),
        "onto": form.onto,
        "data_fingerprints": made_from.get("data_fingerprints", {}),
        "verified": verdict.passed,
        "message": verdict.message,
        "agreement": verdict.agreement.figures(),
        "weights": verdict.weights.figures() if verdict.weights else None,
        "talk": (read_talk(adapter.folder) or Talk()).to_row(),
    }
    lineage = lineage_of(job.folder, made_from, adapter.hash)
    facts = {key.replace("_", " "): value for key, value in values.items() if key not in NOT_ON_THE_CARD}
    facts |= {"base": shown_base(base.name), "onto": ONTO[form.onto], "data": lineage.data, "made with": versions()}
    title = f"{values['run_id'] or adapter.folder.name}, merged"
    card = model_card(title, base=base.name, is_adapter=False, facts=facts, scorecard=lineage.scorecard)
    return seal(folder, card, values)


def register(job: JobContext, out: Path, record: dict[str, Any]) -> None:
    """Note the merged model in the project that it lies in."""
    root, place = job.folder.resolve(), out.resolve()
    if root not in place.parents or not (job.folder / "project.json").is_file():
        return
    run_id = str(job.args.get("run_id") or record["run_id"])
    step = int(job.args.get("step") or record["step"])
    told = ("sha256", "verified", "message", "agreement", "weights", "onto", "number_format")
    detail = {key: record[key] for key in told}
    with open_db(job.folder) as db:
        store.put_output(db, store.Output("merged", str(place.relative_to(root)), run_id, step, detail))
