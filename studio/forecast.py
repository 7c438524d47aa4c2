"""What a run of a project's config will need on a machine, from its data and from earlier runs, and how right that was.

`studio.estimate` has the arithmetic; here it meets the project: stored tokens, measured steps, finished runs.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from studio import datasets, estimate, jobs, loads
from studio.config.catalog.base_models import BY_ID
from studio.config.schema import RowCount, RunConfig
from studio.data import cache
from studio.data.cache import TokenCache
from studio.data.split import split
from studio.data.token_files import TokenFiles
from studio.dataset_checks import tokens_of
from studio.errors import DataError, ModelError
from studio.estimate import Disk, Load, Memory, Suggestion
from studio.machine import Device, device
from studio.model_shapes import Shapes, read_shapes
from studio.model_shapes import shapes_of as shapes_in
from studio.models import resolve
from studio.projects import Project
from studio.store import jobs as store_jobs
from studio.store import metrics, open_db
from studio.store import runs as store_runs
from studio.store.drawn_rows import draw
from studio.store.jobs import Job
from studio.store.runs import Run

MEMORY_METRICS = ("system/gpu_memory_bytes", "system/memory_bytes")
STEP_SECONDS = "train/step_seconds"
MOST_JUDGED_ROWS = 20_000  # to put more in order takes long, and only their proportions matter
ALONE = ["none", "", 1]  # how a run was spread whose row does not say
MEASURE = "measure"


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, and how they are known: `is_measured` by a dry run of this very config, else from a run."""

    seconds_per_step: float
    is_measured: bool
    source: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """What a config needs on a device; `pace` None: nobody knows yet how fast it is.

    `memory` is that of one process, `num_processes` of which share the device. `computes_twice`: with gradient
    checkpointing, as configured or because it would not fit otherwise. `is_in_heap`: for want of compiled layers.
    """

    memory: Memory
    disk: Disk
    load: Load
    device: Device
    is_known_architecture: bool
    pace: Pace | None
    num_processes: int = 1
    computes_twice: bool = False
    is_in_heap: bool = False

    @property
    def needed_bytes(self) -> int:
        """Memory of all processes on the device."""
        return self.memory.total * self.num_processes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.device.memory_bytes


def forecast(
    project: Project | None, config: RunConfig, on: Device | None = None, num_steps: int = 0, budget: int = 0
) -> Forecast:
    """Memory, disk and pace of a config, on this machine or another device. `num_steps`: of the run, 0 if not known.
    `budget`: bytes that it is to fit into, 0 for all that the device has.

    Raises ModelError without config.json, ConfigError for a DeepSpeed file that cannot be used.
    """
    on, shapes = on or device(), shapes_of(config)
    load = load_of(project, config, on)
    number = estimate.processes_on(config, on)
    settled = estimate.settled(config, shapes, load, on, (budget or on.memory_bytes) // number)
    here = project is not None and on == device()
    return Forecast(
        estimate.memory(settled, shapes, load, on),
        estimate.disk(config, shapes, num_steps),
        load,
        on,
        shapes.is_known,
        pace(project, config, load) if here and project else None,
        number,
        settled.train.gradient_checkpointing is True,
        estimate.is_in_heap(config, on),
    )


def suggestions(project: Project | None, config: RunConfig, on: Device, budget: int) -> list[Suggestion]:
    """What to change so that the config fits into `budget` bytes; empty when it does."""
    own = budget // estimate.processes_on(config, on)
    return estimate.suggestions(config, shapes_of(config), lambda each: load_of(project, each, on), on, own)


def shapes_of(config: RunConfig) -> Shapes:
    """The sizes of a config's base model; the published ones where it is known and not on this machine.

    Raises ModelError while they are not known.
    """
    model = resolve(config.model.base)
    if not (model.folder / "config.json").is_file():
        if known := BY_ID.get(model.id):
            return shapes_in(known.shape.config())
        raise ModelError(
            f"The base model {config.model.base!r} is not on this machine yet, so its sizes are not known.",
            "Get the model, or name a folder with its config.json.",
        )
    return read_shapes(model.folder)


def load_of(project: Project | None, config: RunConfig, on: Device) -> Load:
    """The largest micro-batch of the first steps: of the stored tokens where all sources are tokenised, else of some of
    their rows; where those cannot be had either, the longest that may be."""
    if project is None:
        return estimate.longest_load(config, on)
    settings = config.model_dump_json(include={"method", "model", "prompt", "data", "train"})
    if keys := _stored(project, config):
        # A cache that is deleted or damaged: the run will build it again.
        with contextlib.suppress(OSError, ValueError, DataError):
            return _counted(project.folder, keys, settings, on)
    # Without rows or a base model yet, for raw text, and for rows that are too long to look at.
    with contextlib.suppress(OSError, DataError, ModelError):
        found = [datasets.get(project, name) for name in config.data.sources]
        rows = tuple((each.name, each.fingerprint, each.num_rows) for each in found)
        return _judged(project.folder, rows, settings, on)
    return estimate.longest_load(config, on)


def _stored(project: Project, config: RunConfig) -> tuple[tuple[str, str], ...] | None:
    """(source, key of its newest cache of that length) of every source; None when one is missing."""
    wanted = {"max_length": config.data.max_length, "loss_on": config.data.loss_on}
    found: dict[str, str] = {}
    for info in cache.listed(project.folder):
        if wanted.items() <= info.recipe.items():
            found.setdefault(info.dataset, info.key)
    if not set(config.data.sources) <= set(found):
        return None
    return tuple((name, found[name]) for name in config.data.sources)


@lru_cache(maxsize=64)
def _counted(folder: Path, keys: tuple[tuple[str, str], ...], settings: str, on: Device) -> Load:
    config = RunConfig.model_validate_json(settings)
    data, seed = config.data, config.train.seed
    train = {name: split(_opened(folder, key), name, data.valid_share, seed)[0] for name, key in keys}
    return loads.counted(config, train, on)


@lru_cache(maxsize=64)
def _judged(folder: Path, rows: tuple[tuple[str, str, int], ...], settings: str, on: Device) -> Load:
    config = RunConfig.model_validate_json(settings)
    share = min(1.0, MOST_JUDGED_ROWS / max(1, *(number for _name, _digest, number in rows)))

    def fewer(number: int) -> int:
        return max(1, round(share * number))

    train = {name: draw(folder, name, digest, fewer(number), tokens_of(config)) for name, digest, number in rows}
    sources = {
        name: {"rows": fewer(portion.rows)} if isinstance(portion, RowCount) else portion
        for name, portion in config.data.sources.items()
    }
    return loads.counted(estimate.changed(config, {"data.sources": sources}), train, on, "drawn")


def _opened(folder: Path, key: str) -> TokenCache:
    info = next(info for info in cache.listed(folder) if info.key == key)
    return TokenCache(info, TokenFiles(folder / cache.FOLDER / key, info.dtype))


def pace(project: Project, config: RunConfig, load: Load) -> Pace | None:
    """From a dry run of this config on this machine; else from the newest run of its base and method, spread alike."""
    measured = newest_measurement(project, config)
    if measured and measured.state == "finished":
        result = measured.result
        return Pace(result["seconds_per_step"], True, measured.created_at, result["memory_bytes"])
    with open_db(project.folder) as db:
        for run in store_runs.listed(db):
            if run.base == config.model.base and run.method == config.method and _ran_alike(run, config):
                speeds = _values(db, run.id, "train/tokens_per_second")
                if speeds:
                    return Pace(
                        _seconds_like(run, config, load, speeds, _values(db, run.id, STEP_SECONDS)), False, run.id
                    )
    return None


def _ran_alike(run: Run, config: RunConfig) -> bool:
    predicted = run.detail.get("predicted", {})
    return predicted.get("machine") == device().key and predicted.get("spread", ALONE) == _spread(config)


def _spread(config: RunConfig) -> list[Any]:
    spread = config.distributed
    return [spread.strategy, spread.deepspeed if spread.strategy == "deepspeed" else "", spread.world_size]


def _seconds_like(run: Run, config: RunConfig, load: Load, speeds: Sequence[float], seconds: Sequence[float]) -> float:
    """Seconds of a step, by its tokens; by its rows while they are not counted, for few are as long as may be."""
    rows = run.detail["predicted"].get("rows")
    if load.basis != "longest" or not rows or not seconds:
        return load.tokens_per_step / median(speeds)
    return median(seconds) * config.examples_per_step / rows


def start_measuring(project: Project, config: RunConfig) -> Job:
    """Run one real step of the config in a job; its result has seconds_per_step and memory_bytes."""
    args = {"config": config.model_dump(mode="json"), "key": _measure_key(config)}
    return jobs.start(project.folder, MEASURE, args, title=f"measure {config.name}")


def newest_measurement(project: Project, config: RunConfig) -> Job | None:
    """The newest dry run of the same settings on this machine, in whatever state."""
    key = _measure_key(config)
    with open_db(project.folder) as db:
        found = next((job for job in store_jobs.listed(db, kind=MEASURE) if job.args.get("key") == key), None)
    return jobs.get(project.folder, found.id) if found else None


def _measure_key(config: RunConfig) -> str:
    """Equal for the same work on the same machine: what a run records and how long it goes on change no step."""
    work = config.model_dump(mode="json", exclude={"name": True, "record": True, "train": {"num_steps", "num_epochs"}})
    return f"{device().key}-{hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:24]}"


def prediction(project: Project, config: RunConfig) -> dict[str, Any]:
    """What a run remembers of its forecast, to be held against what is measured; {} where none can be made."""
    try:
        made = forecast(project, config)
    except ModelError:
        return {}
    seconds = made.pace.seconds_per_step if made.pace else None
    return {"memory": asdict(made.memory), "memory_bytes": made.memory.total, "seconds_per_step": seconds,
            "machine": made.device.key, "spread": _spread(config), "rows": config.examples_per_step}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Predicted beside measured: bytes at the peak, seconds of a step (the median). None: not known."""

    predicted_bytes: int
    measured_bytes: int
    predicted_seconds: float | None
    measured_seconds: float | None

    @property
    def memory_error(self) -> float:
        """By how much the prediction was off, as a share of what was measured; above 0: too high."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def time_error(self) -> float | None:
        if not self.predicted_seconds or not self.measured_seconds:
            return None
        return self.predicted_seconds / self.measured_seconds - 1


def outcome(project: Project, run: Run) -> Outcome | None:
    """How right a run's forecast was so far; None before its first step, or when it had no forecast."""
    predicted = run.detail.get("predicted") or {}
    with open_db(project.folder) as db:
        peaks = [value for name in MEMORY_METRICS if (value := max(_values(db, run.id, name), default=0))]
        seconds = _values(db, run.id, STEP_SECONDS)
    if not predicted or not peaks:
        return None
    # Where gradient checkpointing was left to free memory, the run itself knew best.
    memory_bytes = run.detail.get("predicted_bytes") or predicted["memory_bytes"]
    return Outcome(memory_bytes, int(peaks[0]), predicted["seconds_per_step"], median(seconds) if seconds else None)


def _values(db: Any, run_id: str, name: str) -> Sequence[float]:
    return [point.value for point in metrics.series(db, run_id, name) if point.value is not None]
