"""What a person does with configs, runs and checkpoints; pages and command line call these, jobs do the work."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from studio import dataset_checks, datasets, forecast, jobs
from studio.chat_client import Connection
from studio.config import catalog, launch
from studio.config.schema import Recipe, RunConfig
from studio.config.yaml import load_config, load_text, save_config, update_text
from studio.data import mix
from studio.data.talk import WEIGHTS_FILE
from studio.errors import CheckpointError, ConfigError, DataError, JobError, ModelError, Problem
from studio.foreign import beginnings
from studio.foreign.xtuner import UNKNOWN_DATA, open_checkpoint
from studio.model_code import require_consent
from studio.models import STARTER, require
from studio.paths import remove, slugify, typed_path
from studio.probes import built_in, library
from studio.probes.suite import Suite
from studio.projects import Project, open_project
from studio.store import checkpoints as store_checkpoints
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store import runs as store
from studio.store.checkpoints import Checkpoint
from studio.store.datasets import not_there
from studio.store.jobs import Job
from studio.store.runs import CONFIG_FILE, LOCK_FILE, Run
from studio.weight_folders import DEFAULT_SHARD_SIZE

LOG_FILE = "run.log"
UNTRAINED = {
    "dpo": "learns from pairs of answers (DPO); Retune imports such pairs and does not train on them yet",
    "orpo": "learns from pairs of answers (ORPO); Retune imports such pairs and does not train on them yet",
    "reward": "trains a reward model on pairs of answers; Retune imports such pairs and does not train on them yet",
    "vision": "trains a model that sees pictures; Retune trains on text only so far",
}


def list_configs(project: Project) -> list[str]:
    """Names of the project's configs."""
    return sorted(path.stem for path in project.path("configs").glob("[!.]*.yaml"))


def preset_text(project: Project, name: str) -> str:
    """A preset's YAML as this project would use it: one for the starter trains the project's own base model."""
    text = catalog.preset_text(name)
    config = load_text(text, name)
    if config.model.base != STARTER or project.base == STARTER:
        return text
    model = config.model.model_copy(update={"base": project.base})
    return update_text(text, config.model_copy(update={"model": model}))


def config_path(project: Project, name: str) -> Path:
    return project.path("configs", f"{name}.yaml")


def problems_before_start(project: Project, config: RunConfig) -> list[Problem]:
    """What would make a run of this config fail at once; empty when it can start."""
    problems = [] if config.task == "sft" else [_untrained(config)]
    there = {dataset.name for dataset in datasets.listed(project)}
    for name in config.data.sources:
        if name not in there and name in config.data.recipes:
            problems.append(Problem("data.sources", _how_to_get(config, name)))
        elif name not in there:
            problems.append(Problem("data.sources", not_there(name, sorted(there))))
    return problems


def _untrained(config: RunConfig) -> Problem:
    return Problem("task", UNTRAINED[config.task], "sft")


def _how_to_get(config: RunConfig, name: str) -> str:
    source = config.data.recipes[name].source
    if source.startswith("path/to/"):
        source = f"your own file: say where it is in data.recipes.{name}.source, then"
    else:
        source = f"{source}:"
    way = f"`retune data fetch {config.name}`, or Get the data on the Config page"
    return f"the dataset {name!r} is not in this project yet. Get it from {source} {way}"


def missing_recipes(project: Project, config: RunConfig) -> dict[str, Recipe]:
    """Datasets of a config that the project lacks, and that the config says where to get."""
    there = {dataset.name for dataset in datasets.listed(project)}
    return {
        name: recipe
        for name, recipe in config.data.recipes.items()
        if name in config.data.sources and name not in there
    }  # fmt: skip


def start_fetch(project: Project, name: str, recipe: Recipe) -> Job:
    """Make the dataset of a recipe, in a job: a hub's data set, or a file of this machine. Rows that cannot be used
    are left out. Raises DataError for what can be told at once."""
    return datasets.start_import(
        project, recipe.source, name, recipe.format or None, keep_good=True, split=recipe.split, subset=recipe.subset
    )  # fmt: skip


def epoch_rows(project: Project, config: RunConfig) -> int:
    """Rows of one epoch, as the trainer counts them if it can use every row. Raises DataError when there is none."""
    sizes = {name: datasets.get(project, name).num_rows for name in config.data.sources}
    trained = {name: size - mix.num_valid_rows(size, config.data.valid_share) for name, size in sizes.items()}
    return mix.epoch_length(trained, config.data.sources)


def planned_steps(project: Project, config: RunConfig) -> int:
    """Optimizer steps of a run. Raises DataError when they are counted in epochs of what is not there."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    return mix.num_steps(epoch_rows(project, config), config.train.num_epochs or 1, config.examples_per_step)


def start_run(
    project: Project, config: RunConfig, allow_lint_errors: bool = False, notes: dict[str, Any] | None = None
) -> tuple[Run, Job]:
    """Freeze a config with a new run, which remembers the version of each dataset and `notes`, and start its job.

    Raises ConfigError, ModelError, or DataError
    when the rows have errors, before anything is made; with `allow_lint_errors` the errors are recorded with the run.
    A run that continues from weights (`model.continue_from`) gets the shape of their adapter.
    """
    if config.task != "sft":
        raise ConfigError([_untrained(config)], config.name)
    require_consent(require(config.model.base))
    config = beginnings.fitting(config)
    if problems := problems_before_start(project, config):
        raise ConfigError(problems, config.name)
    detail = (notes or {}) | {"datasets": _versions(project, config)} | _overridden(project, config, allow_lint_errors)
    detail |= {"continued_from": config.model.continue_from} if config.model.continue_from else {}
    detail |= {"predicted": forecast.prediction(project, config)}
    with FileLock(project.path(LOCK_FILE), timeout=30), open_db(project.folder) as db:
        run_id = store.next_id(db, config.name)
        run_dir = project.path("runs", run_id)
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(run_dir / CONFIG_FILE, config)
        store.add(db, Run(run_id, config.name, config.model.base, config.method, detail=detail))
    return get_run(project, run_id), _start_training(project, run_id, resume="")


def _overridden(project: Project, config: RunConfig, allow: bool) -> dict[str, list[str]]:
    """{"started_despite": errors of the rows}, {} for none. Raises DataError when they are not allowed."""
    errors = dataset_checks.errors_before_start(project, config)
    if errors and not allow:
        lines = "\n".join(f"  - {error}" for error in errors)
        raise DataError(
            f"The rows have errors that would be learned:\n{lines}\n",
            "Correct them (`retune data lint`, `retune data fix`), or start all the same with --allow-lint-errors.",
        )
    return {"started_despite": errors} if errors else {}


def _versions(project: Project, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Which rows a run learns from, however the datasets change later."""
    found = {name: datasets.get(project, name) for name in config.data.sources}
    return {name: {"version": each.version, "fingerprint": each.fingerprint} for name, each in found.items()}


def resume_run(
    project: Project, run_id: str, checkpoint: str = "auto", distributed: dict[str, Any] | None = None
) -> Job:
    """Go on with a run from its newest sound checkpoint, or from one that is named. Raises JobError while it runs.

    `distributed` are settings of that section to change: the rows of a step stay, who computes them is another.
    """
    run = get_run(project, run_id)
    launch.spread_anew(run_config(project, run_id), distributed or {})
    if run.state in store_jobs.LIVE_STATES:
        raise JobError(f"Run {run_id} is {run.state}.", "Stop it first, or let it finish.")
    if "imported" in run.detail:
        raise JobError(
            f"Run {run_id} was trained elsewhere, and its optimizer is not here.",
            "Continue from its weights in a new run: --continue-from.",
        )
    return _start_training(project, run_id, resume=checkpoint, distributed=distributed)


def retry(folder: Path, job_id: str) -> Job:
    """Try an ended job again: a training goes on from its newest sound checkpoint, or begins anew when it has none.

    Raises JobError while it is live.
    """
    job = jobs.get(folder, job_id)
    if job.kind != "train" or not job.run_id:
        return jobs.start_again(folder, job_id)
    return resume_run(open_project(folder.name), job.run_id)


def with_weights(project: Project, config: RunConfig, weights: Checkpoint | None) -> RunConfig:
    """A config that begins with the weights of a checkpoint, and nothing else of it: for another batch size, packing
    or number of processes, with which a run cannot be resumed."""
    if weights is None:
        return config
    model = config.model.model_copy(update={"continue_from": str(project.path(weights.path))})
    return config.model_copy(update={"model": model})


def _start_training(project: Project, run_id: str, resume: str, distributed: dict[str, Any] | None = None) -> Job:
    config_file = project.relative(run_folder(project, run_id) / CONFIG_FILE)
    job = jobs.start(
        project.folder,
        "train",
        {"config": config_file, "resume": resume, "distributed": distributed or {}},
        title=f"train {run_id}",
        run_id=run_id,
        log_path=run_folder(project, run_id) / LOG_FILE,
    )
    with open_db(project.folder) as db:
        store.update(db, run_id, job_id=job.id)
    return job


def get_run(project: Project, run_id: str) -> Run:
    """The run as it is now. Raises JobError, naming the runs there are."""
    jobs.refresh(project.folder)
    with open_db(project.folder) as db:
        return store.get(db, run_id)


def list_runs(project: Project) -> list[Run]:
    """Runs of a project, newest first, those whose process is gone marked lost."""
    jobs.refresh(project.folder)
    with open_db(project.folder) as db:
        return store.listed(db)


def newest_run(project: Project) -> Run:
    """Raises JobError when there is no run yet."""
    found = list_runs(project)
    if not found:
        raise JobError(f"Project {project.slug} has no run yet.", "Train one: retune train starter_lora")
    return found[0]


def run_folder(project: Project, run_id: str) -> Path:
    return project.path("runs", run_id)


def run_config(project: Project, run_id: str) -> RunConfig:
    """The config that was frozen with a run. Raises what `get_run` raises where there is no such run."""
    return load_config(run_folder(project, get_run(project, run_id).id) / CONFIG_FILE)


def delete_checkpoint(project: Project, run_id: str, step: int) -> None:
    """Delete one checkpoint and its manifest; what was converted from it stays."""
    with open_db(project.folder) as db:
        checkpoint = store_checkpoints.get(db, run_id, step)
        store_checkpoints.remove(db, run_id, step)
    path = project.path(checkpoint.path)
    remove(path)
    remove(path.with_suffix(".manifest.json"))


def hf_folder(project: Project, run_id: str, step: int) -> Path:
    """Where the Hugging Face form of a checkpoint lies or will lie."""
    return project.path("hf", f"{run_id}-step_{step}")


def is_converted(project: Project, run_id: str, step: int) -> bool:
    return (hf_folder(project, run_id, step) / WEIGHTS_FILE).is_file()


def start_convert(
    project: Project, run_id: str, step: int, fp32: bool = False, max_shard_size: str = DEFAULT_SHARD_SIZE
) -> Job:
    """`.pth` to a Hugging Face folder, in a job."""
    args = {"run_id": run_id, "step": step, "fp32": fp32, "max_shard_size": max_shard_size}
    return jobs.start(
        project.folder, "convert", args, title=f"convert {run_id} step {step}", run_id=run_id, needs_device=False
    )


def start_merge(
    project: Project,
    run_id: str,
    step: int,
    name: str = "",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    dtype: str = "",
    onto: str = "base",
    overwrite: bool = False,
) -> Job:
    """Fold a converted adapter into its base and check that the result answers the same, in a job.

    `dtype`: float32, float16 or bfloat16, "" for the base's own. `onto`: `base`, or for QLoRA `dequantised`.
    """
    name = name or f"{run_id}-step_{step}"
    if slugify(name).replace("-", "_") != name.replace("-", "_"):
        raise JobError(f"{name!r} cannot name a folder.", f"For example {slugify(name)!r}.")
    args = {
        "base": get_run(project, run_id).base,
        "adapter": str(hf_folder(project, run_id, step)),
        "out": str(project.path("merged", name)),
        "max_shard_size": max_shard_size,
        "device": "auto",
        "run_id": run_id,
        "step": step,
        "dtype": dtype,
        "onto": onto,
        "overwrite": overwrite,
    }
    return jobs.start(project.folder, "merge", args, title=f"merge {run_id} step {step}", run_id=run_id)


def beginning(project: Project, text: str) -> str:
    """The path of what a new run continues from: a path as typed, or a run (its newest checkpoint), or RUN:STEP.

    Raises CheckpointError when there is none.
    """
    path = typed_path(text)
    if path.exists():
        return str(path.resolve())
    run_id, _, step = text.partition(":")
    with open_db(project.folder) as db:
        found = store_checkpoints.listed(db, run_id) if run_id else []
    wanted = [each for each in found if not step or str(each.step) == step]
    if not wanted:
        raise CheckpointError(
            f"There is nothing to continue from at {text!r}.",
            "Give an adapter folder, a .pth, a run of this project, or RUN:STEP.",
        )
    return str(project.path(max(wanted, key=lambda each: each.step).path))


def import_checkpoint(project: Project, path: Path, base: str = "", name: str = "", config: Path | None = None) -> Job:
    """The job that brings in a checkpoint of XTuner (a `.pth`, or a folder of DeepSpeed) as a run of its own, which its
    result names (`run_id`). A job that fails leaves no run.

    `base` is its base model, the one that its config names when left out; `config` the `.py` it was trained with, for
    what it does not say itself. Raises CheckpointError, or ModelError when the base is not here; nothing is made then.
    """
    found = open_checkpoint(path.resolve(), config)
    base = base or found.settings.base
    try:
        require(base)
    except ModelError as error:
        raise ModelError(
            f"{path.name} needs its base model: {error.message}", "Say which model it is: --base."
        ) from error
    found.run_config(base, slugify(name or found.name or path.stem))  # raises for what would make no run
    args = {"path": str(path.resolve()), "base": base, "name": name, "config": str(config.resolve()) if config else ""}
    return jobs.start(project.folder, "import_checkpoint", args, title=f"import {path.name}", needs_device=False)


def probe_sets(project: Project, run_id: str) -> list[str]:
    """Datasets whose held-out probes a run is scored on: those that it was trained on, and a general one in any case.

    What a run that was imported was trained on is not known, so it is scored on all that there are.
    Raises ConfigError when the config that was frozen with the run cannot be read.
    """
    sources = run_config(project, run_id).data.sources
    there = [dataset for dataset in datasets.listed(project) if dataset.num_probes]
    trained = [dataset for dataset in there if dataset.name in sources or UNKNOWN_DATA in sources]
    general = [] if any(dataset.kind == "general" for dataset in trained) else [d for d in there if d.kind == "general"]
    return [dataset.name for dataset in sorted([*trained, *general], key=lambda dataset: dataset.kind == "general")]


def asked_identity(project: Project, probes: list[str]) -> list[str]:
    """Names and makers that these datasets' probes ask for; empty when they ask for none."""
    return built_in.identity_words(probe for name in probes for probe in datasets.load_probes(project, name))


def suite_for(project: Project, run_id: str, suite: str = built_in.STANDARD) -> Suite:
    """A suite as a run would be asked it. Raises DataError when it has nothing to ask, ConfigError when it is wrong."""
    return library.load(project.folder, suite, probe_sets(project, run_id))


def start_evaluate(project: Project, run_id: str, step: int, limit: int = 0, suite: str = built_in.STANDARD) -> Job:
    """Score a checkpoint beside its base with a suite, in a job. `limit` 0 asks all probes, else so many of a group.

    Raises what `suite_for` raises.
    """
    return start_evaluate_all(project, run_id, [step], limit, suite)


def start_evaluate_all(
    project: Project, run_id: str, steps: Sequence[int] = (), limit: int = 0, suite: str = built_in.STANDARD
) -> Job:
    """Score these checkpoints of a run, all for none named, in one job that goes on where it was when it is started
    again. Checkpoints that were scored before with the same suite are not asked again."""
    suite_for(project, run_id, suite)
    with open_db(project.folder) as db:
        there = [each.step for each in store_checkpoints.listed(db, run_id)]
        chosen = [store_checkpoints.get(db, run_id, step).step for step in steps] or sorted(there)
    if not chosen:
        raise JobError(f"Run {run_id} has no checkpoint yet.", "Train it until it has saved one.")
    args: dict[str, Any] = {
        "base": get_run(project, run_id).base,
        "subjects": [{"label": f"{run_id} step {step}", "run_id": run_id, "step": step} for step in chosen],
        "suite": suite,
        "probes": probe_sets(project, run_id) if suite in built_in.NAMES else [],
        "limit": limit,
    }
    what = f"step {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} checkpoints"
    return jobs.start(project.folder, "evaluate", args, title=f"evaluate {run_id} {what}", run_id=run_id)


def start_server(
    folder: Path,
    base: str,
    adapters: list[dict[str, str]],
    port: int = 0,
    idle_seconds: int = 1800,
    **options: str | int,
) -> Job:
    """Start a model server in a project's folder with one base and adapters ({"name", "path"}) on it.

    `options`: dtype, bits, template and offload_folder, as the verb `serve` takes them.
    """
    require_consent(require(base))
    args = {"base": base, "adapters": adapters, "port": port, "idle_seconds": idle_seconds, **options}
    return jobs.start(folder, "serve", args, title=f"serve {base}", needs_device=False)


def server_connection(project: Project, job: Job) -> Connection | None:
    """Where a model server answers; None while it is still loading."""
    path = project.path("jobs", job.id, "connection.json")
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Connection(values["url"], values["token"])


def wait(project_folder: Path, job: Job, timeout_seconds: float = 3600) -> Job:
    """Block until a job has ended and return it. Raises JobError with its cause when it failed or was lost."""
    deadline = time.monotonic() + timeout_seconds
    for current in jobs.watch(project_folder, job.id):
        if not current.live:
            if current.state in ("failed", "lost"):
                raise JobError(f"{current.title} {current.state}: {current.cause}", f"Log: {current.log_path}")
            return current
        if time.monotonic() > deadline:
            raise JobError(f"{current.title} did not end in {timeout_seconds:.0f} s.", f"Log: {current.log_path}")
    raise JobError(f"{job.title} cannot be watched.")
