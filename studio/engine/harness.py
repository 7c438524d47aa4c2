"""The `lm_eval` verb: tasks of lm-evaluation-harness, asked of a checkpoint and of its base, from local files alone."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")

from datasets.exceptions import DatasetsError  # noqa: E402
from jinja2 import TemplateError  # noqa: E402
from torch import nn  # noqa: E402

from studio.engine.adapters import load_adapter  # noqa: E402
from studio.engine.convert import weights_of_run  # noqa: E402
from studio.engine.devices import pick_device, pick_dtype, set_threads  # noqa: E402
from studio.engine.generate import quiet, wearing  # noqa: E402
from studio.engine.job import JobContext  # noqa: E402
from studio.engine.models.load import LoadedModel, load_base  # noqa: E402
from studio.engine.weights import read_seal, versions  # noqa: E402
from studio.errors import DataError, JobError  # noqa: E402
from studio.harness_tasks import EXTRA, Task, read_tasks  # noqa: E402
from studio.models import require  # noqa: E402
from studio.paths import atomic_write_json  # noqa: E402
from studio.store import checkpoints, open_db  # noqa: E402
from studio.weight_folders import ADAPTER_CONFIG  # noqa: E402

BATCH = 8
KIND = "lm_eval"
FAULTS_OF_A_TASK = (TemplateError, DatasetsError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


def run(job: JobContext) -> dict[str, Any]:
    """Args: base, run_id, step, tasks (a folder), limit (0: all rows). The results go to reports/lm_eval/."""
    if find_spec("lm_eval") is None:
        raise JobError("lm-evaluation-harness is not installed.", f"Install it: {EXTRA}")
    args = job.args
    tasks, limit = read_tasks(Path(args["tasks"])), int(args.get("limit") or 0)
    set_threads()
    device = pick_device()
    job.phase("loading the base model")
    loaded = load_base(require(args["base"]), dtype=pick_dtype("auto", device), device=device)
    job.phase("asking the base model")
    base = ask(loaded, loaded.model, tasks, limit)
    job.check_stop()
    with weights_of_run(job, args["run_id"], int(args["step"]), job.folder / "jobs" / job.id) as folder:
        job.phase("asking the tuned model")
        tuned = _ask_tuned(loaded, folder, tasks, limit)
        return _store(job, base, tuned, read_seal(folder).get("sha256", ""))


def ask(loaded: LoadedModel, model: nn.Module, tasks: list[Task], limit: int) -> dict[str, Any]:
    """task -> {"num_rows", "metrics": {name: {"value", "stderr", "marks"}}}; marks are the values of single rows."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    _sandbox_templates()
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    with quiet(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)  # type: ignore[arg-type]
        try:
            found = lm_eval.simple_evaluate(
                harness, tasks=[dict(task) for task in tasks], limit=limit or None,
                task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000,
            )  # fmt: skip
        except FAULTS_OF_A_TASK as error:
            raise DataError(
                f"The harness cannot ask these tasks: {type(error).__name__}: {error}",
                "Correct the task's YAML or its rows.",
            ) from error
    return {name: _result(values, found["samples"].get(name, [])) for name, values in found["results"].items()}


def _sandbox_templates() -> None:
    """The harness renders prompts with a Jinja environment that could reach anything in Python; ours cannot."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    env = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters.update(utils.env.filters)
    utils.env = env


def _ask_tuned(loaded: LoadedModel, folder: Path, tasks: list[Task], limit: int) -> dict[str, Any]:
    if not (folder / ADAPTER_CONFIG).is_file():
        full = load_base(folder, dtype=loaded.dtype, device=loaded.device)
        return ask(full, full.model, tasks, limit)
    model = load_adapter(loaded.model, folder, "tuned")
    with wearing(model, "tuned"):
        return ask(loaded, model, tasks, limit)


def _result(values: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of "acc,none": 0.5 and "acc_stderr,none": 0.1 one metric. Raises DataError for a task that measured nothing.

    `samples` hold each row once for every filter of the task.
    """
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        name, _, its_filter = key.partition(",")
        if not its_filter or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{its_filter}")
        filtered = [sample for sample in samples if sample["filter"] == its_filter]
        marks = [sample[name] for sample in filtered if isinstance(sample.get(name), int | float)]
        label = name if its_filter == "none" else f"{name} ({its_filter})"
        metrics[label] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "marks": [float(mark) for mark in marks],
        }
    if not metrics:
        raise DataError(f"The task {values.get('alias')!r} measured nothing.", "Look at its `metric_list`.")
    return {"num_rows": int(values.get("sample_len") or len(samples)), "metrics": metrics}


def _store(job: JobContext, base: dict[str, Any], tuned: dict[str, Any], weights_hash: str) -> dict[str, Any]:
    run_id, step = job.args["run_id"], int(job.args["step"])
    path = job.folder / "reports" / KIND / f"{run_id}-step_{step}-{job.id}.json"
    detail = {
        "base": job.args["base"],
        "weights_hash": weights_hash,
        "tasks_folder": job.args["tasks"],
        "limit": int(job.args.get("limit") or 0),
        "versions": versions() | {"lm_eval": _version()},
        "results": {name: {"base": base[name], "tuned": tuned[name]} for name in base},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, detail)
    output = checkpoints.Output(KIND, str(path.relative_to(job.folder)), run_id, step, detail)
    with open_db(job.folder) as db:
        checkpoints.put_output(db, output)
    return {"output": output.id, "path": output.path}


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
