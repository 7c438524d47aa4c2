"""`convert`: a `.pth` checkpoint becomes a Hugging Face folder: an adapter in PEFT's format, or a full model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from studio.checkpoint_files import manifest_path
from studio.config.schema import ADAPTER_METHODS, RunConfig, parse_config
from studio.conversions import (
    base_of_foreign,
    check_convert,
    is_foreign,
    number_format,
    opened,
    places,
)
from studio.data.talk import talk_of
from studio.engine.card import model_card, shown_base
from studio.engine.checkpoint import FORMAT, verify
from studio.engine.devices import DTYPES
from studio.engine.foreign import cast, in_our_format
from studio.engine.job import JobContext
from studio.engine.models.families import native
from studio.engine.weights import (
    WEIGHTS_FILE,
    Base,
    copy_tokenizer,
    known_base,
    on_disk,
    output_folder,
    own_dtype,
    save_tensors,
    seal,
    tokenizer_bytes,
    write_named_template,
)
from studio.engine.zero_folder import FolderWeights, read_own
from studio.errors import CheckpointError, ConfigError, ModelError, Problem
from studio.foreign.xtuner import XTunerCheckpoint
from studio.models import resolve
from studio.paths import atomic_write_json, remove
from studio.store import checkpoints as store
from studio.store import open_db
from studio.weight_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DEFAULT_SHARD_SIZE, shard_bytes

NEXT_MOVE = "Use another checkpoint of the run, or train again."
EMBEDDING = "model.embed_tokens.weight"
XTUNERS_DTYPE = "float16"
"""What XTuner writes when nothing else is asked for; so its checkpoints become what they become there."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read, where its folder is to be, and the run that it belongs to, if any.

    `origin` is empty for our own checkpoints, else what is known of a foreign one.
    """

    pth: Path
    out: Path
    config: RunConfig
    meta: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    data_fingerprints: dict[str, str]
    run_id: str = ""
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return self.meta["method"] in ADAPTER_METHODS

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def run(job: JobContext) -> dict[str, Any]:
    """Args: run_id and step, or config (a file or a run's id), pth and out; dtype, fp32, max_shard_size, base,
    overwrite.

    `pth` may be a checkpoint of XTuner, a file or a folder of DeepSpeed, and `config` its `.py`, which is not run;
    `base` then names the base model, where the one in the config is not here. Such a checkpoint becomes float16 as in
    XTuner. Of ours, an adapter keeps the number format it was trained in (it is small, and so nothing is lost), and a
    full model gets the base's own. `dtype` (or fp32, for float32) asks for another. What lies at `out` is replaced with
    `overwrite` alone; a run's own folder in the project always, for it holds the same checkpoint.
    Raises CheckpointError for a damaged or foreign file; `out` then stays as it was.
    """
    check_convert(job.folder, job.args)
    limit = shard_bytes(job.args.get("max_shard_size") or DEFAULT_SHARD_SIZE)
    pth, out, run_id, config = places(job.folder, job.args)
    return _convert_to(job, pth, out, run_id, config, dtype=number_format(job.args), max_shard_bytes=limit)


@contextmanager
def weights_of_run(job: JobContext, run_id: str, step: int, scratch: Path) -> Iterator[Path]:
    """The Hugging Face folder of a run's checkpoint; one that has to be converted for this goes into `scratch`, and is
    gone afterwards."""
    pth, out, run_id, config = places(job.folder, {"run_id": run_id, "step": step})
    if (out / WEIGHTS_FILE).is_file():
        yield out
        return
    made, limit = scratch / out.name, shard_bytes(DEFAULT_SHARD_SIZE)
    try:
        _convert_to(job, pth, made, run_id, config, dtype="", max_shard_bytes=limit, keep=False)
        yield made
    finally:
        remove(made)


def _convert_to(
    job: JobContext,
    pth: Path,
    out: Path,
    run_id: str,
    config: RunConfig | None,
    *,
    dtype: str,
    max_shard_bytes: int,
    keep: bool = True,
) -> dict[str, Any]:
    """`keep`: the folder stays, and is noted in the database."""
    job.phase("reading the checkpoint")
    if is_foreign(pth):
        source, base = _read_foreign(pth, out, job.args, DTYPES[dtype or XTUNERS_DTYPE])
    else:
        source = read_source(pth, out, config, run_id)
        job.check_stop()
        base = known_base(source.config.model.base, str(source.meta.get("base_fingerprint", "")), source.pth.name)
    job.check_stop()
    job.phase("writing the weights")
    record = convert(source, base, dtype=DTYPES.get(dtype), max_shard_bytes=max_shard_bytes)
    if keep:
        _register(job, source, record)
    kind = "adapter" if source.is_adapter else "model"
    return {"path": str(out), "kind": kind, "sha256": record["sha256"], "run_id": source.run_id, "step": source.step}


def _read_foreign(pth: Path, out: Path, args: dict[str, Any], dtype: torch.dtype) -> tuple[Source, Base]:
    """A checkpoint of XTuner, cast as it is read, and its base."""
    found = opened(pth, args)
    base = _foreign_base(found, str(args.get("base") or ""))
    content = in_our_format(found, base.name, dtype)
    meta, tensors = content["meta"], content["state_dict"]
    _check_content(pth, meta, tensors)
    return Source(pth, out, parse_config(meta["config"], pth.name), meta, tensors, {}, origin=meta["origin"]), base


def _foreign_base(found: XTunerCheckpoint, asked: str) -> Base:
    """An adapter can be converted without its base."""
    name = base_of_foreign(found, asked)
    return known_base(name) if name else Base(_plausible(found.settings.base), Path(), "", found.settings.base)


def _plausible(name: str) -> str:
    """A name that could be that of a base model, for the record."""
    try:
        resolve(name)
    except ModelError:
        return f"unknown/{''.join(c if c.isalnum() else '_' for c in name)[:60] or 'base'}"
    return name


def read_source(pth: Path, out: Path, config: RunConfig | None = None, run_id: str = "") -> Source:
    """Check and load a checkpoint. Raises CheckpointError, or UnsafeFileError for one that would run code."""
    if manifest_path(pth).is_file():
        verify(pth)
    content = read_own(pth)
    meta, tensors = content.get("meta"), content.get("state_dict")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(
            f"{pth.name} is not a checkpoint of this studio: its format is {found!r}.", f"Allowed: {FORMAT}."
        )
    _check_content(pth, meta, tensors)
    if config is None:
        config = parse_config(meta["config"], f"the config in {pth.name}")
    if config.method != meta["method"]:
        raise ConfigError(
            [Problem("method", f"the config says {config.method}, {pth.name} was trained with {meta['method']}")]
        )
    data = content.get("data")
    fingerprints = data.get("fingerprints") if isinstance(data, dict) else None
    return Source(pth, out, config, meta, tensors, fingerprints or {}, run_id or str(meta.get("run_id") or ""))


def convert(source: Source, base: Base, *, dtype: torch.dtype | None = None, max_shard_bytes: int) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return what its retune_weights.json says."""
    if dtype is None and not source.is_adapter and not source.origin:
        dtype = own_dtype(base.folder)
    with output_folder(source.out, _bytes_needed(source, base, dtype)) as folder:
        tensors = _cast_to(source, dtype, None if source.is_adapter else folder.parent)
        if source.is_adapter:
            _write_adapter(folder, source, base, tensors)
        else:
            write_model(folder, base, tensors, max_shard_bytes, source.pth.name)
        if base.is_here:
            copy_tokenizer(base.folder, folder)
        if (template := source.config.data.template) and base.is_here:
            write_named_template(template, base.folder, folder)
        facts = _facts(source, base, tensors)
        title = f"{source.run_id or source.config.name}, step {source.step}"
        config = source.config.model_dump(mode="json")
        config["model"]["base"] = shown_base(base.name)
        card = model_card(
            title,
            base=base.name,
            is_adapter=source.is_adapter,
            facts=facts,
            config=None if source.origin else config,
        )
        return seal(folder, card, _identity(source, base))


def _bytes_needed(source: Source, base: Base, dtype: torch.dtype | None) -> int:
    """The folder; and a whole model once more, for it waits on the disk until it is written."""
    weights = source.tensors
    count = weights.num_elements if isinstance(weights, FolderWeights) else sum(map(torch.numel, weights.values()))
    num_bytes = count * (dtype or torch.float32).itemsize * (1 if source.is_adapter else 2)
    return num_bytes + (tokenizer_bytes(base.folder) if base.is_here else 0)


def _cast_to(source: Source, dtype: torch.dtype | None, scratch: Path | None) -> dict[str, torch.Tensor]:
    """The weights in a number format, one read at a time; with `scratch` they wait in files there, not in memory."""
    found = {}
    for name, tensor in source.tensors.items():
        made = cast(tensor, dtype, name, source.pth.name)
        found[name] = on_disk(made, scratch) if scratch else made
    return found


def _check_content(pth: Path, meta: dict[str, Any], tensors: Any) -> None:
    if missing := [name for name in ("step", "method", "config") if name not in meta]:
        raise CheckpointError(f"{pth.name} does not say its {missing[0]}.", NEXT_MOVE)
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{pth.name} holds no weights.", NEXT_MOVE)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{pth.name} holds {name!r}, which is not a tensor.", NEXT_MOVE)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {pth.name} holds NaN or infinite numbers: training diverged.", NEXT_MOVE)
    if meta["method"] in ADAPTER_METHODS and not isinstance(meta.get("adapter_config"), dict):
        raise CheckpointError(f"{pth.name} is an adapter without its adapter_config.", NEXT_MOVE)


def _write_adapter(folder: Path, source: Source, base: Base, tensors: dict[str, torch.Tensor]) -> None:
    config = source.meta["adapter_config"] | {"base_model_name_or_path": base.reference, "inference_mode": True}
    atomic_write_json(folder / ADAPTER_CONFIG, config)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)


def write_model(folder: Path, base: Base, tensors: dict[str, torch.Tensor], max_shard_bytes: int, what: str) -> None:
    """Let transformers write its own format, from a model without memory of its own that the tensors are put into."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if found := native(base.folder):
        config, tensors = found.config, found.translated(tensors)
    else:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    if (embedding := tensors.get(EMBEDDING)) is not None:
        config.vocab_size = embedding.shape[0]  # XTuner may have made it larger, for new tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        loaded = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{what} does not fit {base.name!r}: {' '.join(str(error).split())[:300]}") from error
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking or loaded.unexpected_keys:
        odd = f"{lacking[0]} is missing" if lacking else f"{loaded.unexpected_keys[0]} is not part of it"
        raise CheckpointError(f"{what} does not fit {base.name!r}: {odd}.", "Give the base that it was trained on.")
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)


def _identity(source: Source, base: Base) -> dict[str, Any]:
    return {
        "kind": "adapter" if source.is_adapter else "model",
        "run_id": source.run_id,
        "step": source.step,
        "method": source.meta["method"],
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "data_fingerprints": source.data_fingerprints,
        "talk": talk_of(source.config.data.template).to_row(),
    }


def _facts(source: Source, base: Base, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the card's table says."""
    config = source.config
    if source.origin:
        return {"base": shown_base(base.name), "method": source.meta["method"], "step": source.step} | {
            name: value for name, value in source.origin.items() if name not in ("file", "base", "parts", "file bytes")
        }
    return {
        "base": shown_base(base.name),
        "base fingerprint": base.fingerprint,
        "method": source.meta["method"],
        "run": source.run_id,
        "step": source.step,
        "number format": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        "data": config.data.model_dump(mode="json")["sources"],
        "data fingerprint": {name: print_[:16] for name, print_ in source.data_fingerprints.items()},
        "learning rate": config.train.learning_rate,
        "examples per step": config.examples_per_step,
        "seed": config.train.seed,
        "trained with": source.meta.get("versions", ""),
    }


def _register(job: JobContext, source: Source, record: dict[str, Any]) -> None:
    """Note the folder in the project that it lies in; elsewhere there is nothing to note it in."""
    root = job.folder.resolve()
    out = source.out.resolve()
    if not source.run_id or root not in out.parents:
        return
    detail = {"sha256": record["sha256"], "kind": record["kind"], "method": record["method"]}
    with open_db(job.folder) as db:
        path = str(out.relative_to(root))
        store.put_output(db, store.Output("hf", path, source.run_id, source.step, detail))
