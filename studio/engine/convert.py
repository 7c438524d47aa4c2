"""`convert`: a `.pth` checkpoint becomes a Hugging Face folder: an adapter in PEFT's format, or a full model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from studio.checkpoint_files import manifest_path
from studio.config.schema import RunConfig, parse_config
from studio.config.yaml import load_config
from studio.data.talk import talk_of
from studio.engine.card import model_card, shown_base
from studio.engine.checkpoint import FORMAT, verify
from studio.engine.job import JobContext
from studio.engine.safe_load import load_pth
from studio.engine.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHTS_FILE,
    Base,
    copy_tokenizer,
    known_base,
    output_folder,
    own_dtype,
    require_replaceable,
    save_tensors,
    seal,
    shard_bytes,
    tokenizer_bytes,
    write_named_template,
)
from studio.errors import CheckpointError, ConfigError, Problem, StudioError
from studio.paths import atomic_write_json, inside
from studio.store import checkpoints as store
from studio.store import open_db

ADAPTER_METHODS = ("lora", "qlora")
DEFAULT_SHARD_SIZE = "2GB"
NEXT_MOVE = "Use another checkpoint of the run, or train again."


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read, where its folder is to be, and the run that it belongs to, if any."""

    pth: Path
    out: Path
    config: RunConfig
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    data_fingerprints: dict[str, str]
    run_id: str = ""

    @property
    def is_adapter(self) -> bool:
        return self.meta["method"] in ADAPTER_METHODS

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def run(job: JobContext) -> dict[str, Any]:
    """Args: run_id and step, or config (a file or a run's id), pth and out; fp32, max_shard_size.

    Without `fp32` an adapter keeps the number format it was trained in (it is small, and so nothing is lost), and a
    full model gets the base's own. With `fp32` every tensor is written in float32.
    Raises CheckpointError for a damaged or foreign file; `out` then stays as it was.
    """
    limit = shard_bytes(job.args.get("max_shard_size") or DEFAULT_SHARD_SIZE)
    return _convert_to(job, *_places(job.folder, job.args), fp32=bool(job.args.get("fp32")), max_shard_bytes=limit)


def folder_of_run(job: JobContext, run_id: str, step: int) -> Path:
    """The Hugging Face folder of a run's checkpoint; converts it first when that was not done."""
    pth, out, run_id, config = _places(job.folder, {"run_id": run_id, "step": step})
    if not (out / WEIGHTS_FILE).is_file():
        limit = shard_bytes(DEFAULT_SHARD_SIZE)
        _convert_to(job, pth, out, run_id, config, fp32=False, max_shard_bytes=limit)
    return out


def _convert_to(
    job: JobContext, pth: Path, out: Path, run_id: str, config: RunConfig | None, *, fp32: bool, max_shard_bytes: int
) -> dict[str, Any]:
    require_replaceable(out)
    job.phase("reading the checkpoint")
    source = read_source(pth, out, config, run_id)
    job.check_stop()
    base = known_base(source.config.model.base, str(source.meta.get("base_fingerprint", "")), source.pth.name)
    job.phase("writing the weights")
    record = convert(source, base, fp32=fp32, max_shard_bytes=max_shard_bytes)
    _register(job, source, record)
    kind = "adapter" if source.is_adapter else "model"
    return {"path": str(out), "kind": kind, "sha256": record["sha256"], "run_id": source.run_id, "step": source.step}


def read_source(pth: Path, out: Path, config: RunConfig | None = None, run_id: str = "") -> Source:
    """Check and load a checkpoint. Raises CheckpointError, or UnsafeFileError for one that would run code."""
    if manifest_path(pth).is_file():
        verify(pth)
    content = load_pth(pth)
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


def convert(source: Source, base: Base, *, fp32: bool, max_shard_bytes: int) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return what its retune_weights.json says."""
    dtype = torch.float32 if fp32 else None if source.is_adapter else own_dtype(base.folder)
    tensors = _cast(source.tensors, dtype)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values()) + tokenizer_bytes(base.folder)
    with output_folder(source.out, num_bytes) as folder:
        if source.is_adapter:
            _write_adapter(folder, source, base, tensors)
        else:
            _write_model(folder, base, tensors, max_shard_bytes, source.pth.name)
        copy_tokenizer(base.folder, folder)
        if template := source.config.data.template:
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
            config=config,
        )
        return seal(folder, card, _identity(source, base))


def _places(folder: Path, args: dict[str, Any]) -> tuple[Path, Path, str, RunConfig | None]:
    """(checkpoint, output folder, run id, config to hold it against); the id is empty outside a project's runs."""
    if args.get("run_id"):
        run_id, step = str(args["run_id"]), int(args["step"])
        with open_db(folder) as db:
            checkpoint = store.get(db, run_id, step)
        out = args.get("out") or inside(folder, Path("hf", f"{run_id}-step_{step}"))
        return inside(folder, checkpoint.path), Path(out), run_id, None
    if missing := [name for name in ("pth", "out") if not args.get(name)]:
        raise StudioError(f"convert needs {' and '.join(missing)}.", "Give a run and a step, or config, pth and out.")
    pth, out = Path(args["pth"]), Path(args["out"])
    config, run_id = _config_of(folder, str(args.get("config") or ""))
    return pth, out, run_id or _run_of(folder, pth), config


def _config_of(folder: Path, given: str) -> tuple[RunConfig | None, str]:
    """The config of a file or of a run, and the run's id in the latter case."""
    if not given:
        return None, ""
    if Path(given).is_file():
        return load_config(Path(given)), ""
    frozen = inside(folder, Path("runs", given, "config.yaml"))
    if not frozen.is_file():
        problem = Problem("config", f"{given!r} is neither a config file nor a run of this project")
        raise ConfigError([problem], "convert")
    return load_config(frozen), given


def _run_of(folder: Path, pth: Path) -> str:
    runs = (folder / "runs").resolve()
    parent = pth.resolve().parent
    return parent.name if parent.parent == runs else ""


def _check_content(pth: Path, meta: dict[str, Any], tensors: Any) -> None:
    if missing := [name for name in ("step", "method", "config") if name not in meta]:
        raise CheckpointError(f"{pth.name} does not say its {missing[0]}.", NEXT_MOVE)
    if not isinstance(tensors, dict) or not tensors:
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


def _write_model(folder: Path, base: Base, tensors: dict[str, torch.Tensor], max_shard_bytes: int, what: str) -> None:
    """Let transformers write its own format, from a model without memory of its own that the tensors are put into."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
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


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


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
