"""What a job that converts, merges, splits or lays out is given: looked at before it starts, and when its turn comes.

Whatever can be known without reading weights is known here, at once: a base that is missing costs nobody a wait.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.checkpoint_files import STATE_FILE, manifest_path
from studio.config.catalog import is_built_in, preset
from studio.config.schema import RunConfig
from studio.config.yaml import load_config
from studio.errors import ConfigError, ModelError, Problem, StudioError
from studio.foreign.settings import settings_of
from studio.foreign.torch_file import open_dictionary
from studio.foreign.xtuner import XTunerCheckpoint, open_checkpoint
from studio.models import missing_parts, require
from studio.paths import inside
from studio.store import checkpoints as store
from studio.store import open_db
from studio.store.runs import CONFIG_FILE
from studio.weight_folders import (
    DEFAULT_SHARD_SIZE,
    adapter_config,
    require_free,
    require_replaceable,
    shard_bytes,
    weight_files,
)

NUMBER_FORMATS = ("float32", "float16", "bfloat16")
ONTO = {
    "base": "the base in its own number format, as Compare and the scorecard use it",
    "dequantised": "the base as it was squeezed to 4 bits in training, unpacked again",
}
"""What an adapter is folded into. Only QLoRA knows a difference: it never saw the base in its own format."""
FORMAT_KEY = "format"  # in the `meta` of our own checkpoints, and of nobody else's

Args = Mapping[str, Any]


def check(kind: str, folder: Path, args: Args) -> None:
    """Raise the StudioError that the job of this kind in `folder` would end with, as far as it can be seen now."""
    checks = {"convert": check_convert, "merge": check_merge, "split": check_split, "layout": check_layout}
    checks[kind](folder, args)


def check_convert(folder: Path, args: Args) -> None:
    """Number format, size of files, checkpoint, place, and the base model."""
    _check_form(args)
    pth, out, _run, config = places(folder, args)
    require_replaceable(out)
    if args.get("out"):
        require_free(out, bool(args.get("overwrite")))
    if is_foreign(pth):
        base_of_foreign(opened(pth, args), str(args.get("base") or ""))
    elif base := config.model.base if config else _base_in(pth):
        require(base)


def check_merge(_folder: Path, args: Args) -> None:
    """As `check_convert`, and the adapter's folder; a base with another fingerprint is found by the job."""
    _check_form(args)
    if (onto := str(args.get("onto") or "base")) not in ONTO:
        raise StudioError(f"An adapter cannot be merged onto {onto!r}.", f"Allowed: {', '.join(ONTO)}.")
    base, adapter, out = require(str(args["base"])), Path(args["adapter"]), Path(args["out"])
    adapter_config(adapter)
    if out.resolve() in (adapter.resolve(), base.resolve()):
        raise StudioError(f"{str(out)!r} is what the merge is made from.", "Choose another folder for the result.")
    require_replaceable(out)
    require_free(out, bool(args.get("overwrite")))


def check_split(_folder: Path, args: Args) -> None:
    """The weights of a model folder, and a place where nothing lies."""
    _require_nothing_at(Path(args["out"]))
    weight_files(Path(args["source"]))


def check_layout(_folder: Path, args: Args) -> None:
    """A model folder, the folder whose layout is wanted, and a place where nothing lies."""
    _require_nothing_at(Path(args["out"]))
    for given in filter(None, (args["source"], args.get("own"))):
        if not (Path(given) / "config.json").is_file():
            lacking = ", ".join(missing_parts(Path(given)))
            raise ModelError(f"{str(given)!r} is no model folder: {lacking}.", "Give one with config.json and weights.")
    weight_files(Path(args["source"]))


def number_format(args: Args) -> str:
    """The number format that is asked for; "" for none. Raises StudioError."""
    asked = "float32" if args.get("fp32") else str(args.get("dtype") or "")
    if asked and asked not in NUMBER_FORMATS:
        raise StudioError(f"Weights cannot be written as {asked!r}.", f"Allowed: {', '.join(NUMBER_FORMATS)}.")
    return asked


def places(folder: Path, args: Args) -> tuple[Path, Path, str, RunConfig | None]:
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


def is_foreign(pth: Path) -> bool:
    """Whether a checkpoint is not in our own format. Raises CheckpointError, UnsafeFileError."""
    if manifest_path(pth).is_file():
        return False
    if pth.is_dir():
        return not (pth / STATE_FILE).is_file()
    meta = open_dictionary(pth).content.get("meta")
    return not isinstance(meta, dict) or FORMAT_KEY not in meta


def opened(pth: Path, args: Args) -> XTunerCheckpoint:
    """A checkpoint of XTuner with what its config adds: a `.py`, a config of ours, or the name of a built-in one.

    Raises CheckpointError, UnsafeFileError.
    """
    given = str(args.get("config") or "")
    if given.endswith(".py"):
        return open_checkpoint(pth, Path(given))
    found = open_checkpoint(pth)
    if Path(given).is_file():
        return found.with_settings(settings_of(load_config(Path(given))))
    return found.with_settings(settings_of(preset(given))) if is_built_in(given) else found


def base_of_foreign(found: XTunerCheckpoint, asked: str) -> str:
    """The base that is asked for, else the one that the config names; "" for an adapter whose base is not here.

    Raises ModelError where the base is needed and missing.
    """
    try:
        require(asked or found.settings.base)
    except ModelError as error:
        if asked or not found.is_adapter:
            raise ModelError(
                f"{found.path.name} needs its base model: {error.message}", "Name it with --base."
            ) from error
        return ""
    return asked or found.settings.base


def _check_form(args: Args) -> None:
    number_format(args)
    shard_bytes(args.get("max_shard_size") or DEFAULT_SHARD_SIZE)


def _require_nothing_at(out: Path) -> None:
    if out.exists():
        raise StudioError(f"{str(out)!r} is there already; it was not touched.", "Choose a folder that is not there.")


def _base_in(pth: Path) -> str:
    """The base that a checkpoint of ours says it was trained on; "" where it does not."""
    content = open_dictionary(pth / STATE_FILE if pth.is_dir() else pth).content
    meta = content.get("meta")
    config = meta.get("config") if isinstance(meta, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    return str(model.get("base") or "") if isinstance(model, dict) else ""


def _config_of(folder: Path, given: str) -> tuple[RunConfig | None, str]:
    """The config of a file or of a run, and the run's id in the latter case."""
    if not given or given.endswith(".py") or is_built_in(given):
        return None, ""
    if Path(given).is_file():
        return load_config(Path(given)), ""
    frozen = inside(folder, Path("runs", given, CONFIG_FILE))
    if not frozen.is_file():
        problem = Problem("config", f"{given!r} is neither a config file nor a run of this project")
        raise ConfigError([problem], "convert")
    return load_config(frozen), given


def _run_of(folder: Path, pth: Path) -> str:
    runs = (folder / "runs").resolve()
    parent = pth.resolve().parent
    return parent.name if parent.parent == runs else ""
