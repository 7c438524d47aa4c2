"""Many short lives of a training process: each forks from one that has imported everything already."""

import multiprocessing
import os
import re
import sys
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from studio.engine.safe_load import load_pth
from studio.paths import atomic_write_json
from studio.projects import Project
from studio.store import checkpoints, jobs, metrics, open_db, runs, samples
from studio.store.jobs import Job

EXACT = ("train/loss", "train/learning_rate", "train/grad_norm", "train/trained_tokens", "valid/loss")
PARTS = ("state_dict", "optimizer", "scaler", "rng", "data", "schedule", "counters")


def lives() -> ForkServerContext:
    """Processes of this context begin with torch, transformers and the trainer imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studio.engine.train", "transformers.models.llama.modeling_llama", "bitsandbytes"])
    return context


def live(
    context: ForkServerContext, project: Project, run_id: str, fault: str = "", trace: Path | None = None
) -> multiprocessing.process.BaseProcess:
    """Start the run, or resume it when it has a checkpoint, in a process of its own, with a plan of faults."""
    args = {"config": f"runs/{run_id}/config.yaml", "resume": "auto"}
    job = Job(kind="train", run_id=run_id, args=args)
    job_dir = project.path("jobs", job.id)
    job_dir.mkdir(parents=True)
    written = {"id": job.id, "kind": "train", "folder": str(project.folder), "args": args}
    atomic_write_json(job_dir / "job.json", written)
    with open_db(project.folder) as db:
        jobs.add(db, job)
        runs.update(db, run_id, job_id=job.id)
    home = {name: os.environ[name] for name in ("RETUNE_HOME", "RETUNE_MODELS")}
    process = context.Process(target=_life, args=(job_dir, home, fault, str(trace or "")), daemon=True)
    # A child imports the main module of its parent; a page that a test ran here before may have left its own as that.
    with patch.dict(sys.modules, {"__main__": sys.modules[__name__]}):
        process.start()
    return process


def _life(job_dir: Path, environment: dict[str, str], fault: str, trace: str) -> None:
    os.environ.update(environment)
    log = os.open(job_dir / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    from studio import faults
    from studio.engine.__main__ import main

    faults.arm(fault, trace)
    os._exit(main("train", job_dir))


def finish(context: ForkServerContext, project: Project, run_id: str) -> None:
    """Live without faults to the end."""
    process = live(context, project, run_id)
    process.join(120)
    with open_db(project.folder) as db:
        job = jobs.get(db, runs.get(db, run_id).job_id)
    assert process.exitcode == 0 and job.state == "finished", (process.exitcode, job.cause, log_of(project, job))


def log_of(project: Project, job: Job) -> str:
    return project.path("jobs", job.id, "job.log").read_text()[-3000:]


def outcome(project: Project, run_id: str) -> dict[str, Any]:
    """Every number, sample, checkpoint and file that a run left, without times and memory."""
    with open_db(project.folder) as db:
        numbers = {name: [(point.step, point.value) for point in metrics.series(db, run_id, name)] for name in EXACT}
        said = [(each.step, each.prompt, each.text, each.error) for each in samples.listed(db, run_id)]
        kept = [each.step for each in checkpoints.listed(db, run_id)]
        stored = metrics.count(db, run_id, 10**9)
    folder = project.path("runs", run_id)
    files = sorted(file.name for file in folder.iterdir() if file.name != "run.log")
    last = max(folder.glob("step_*.pth"), key=lambda file: int(re.sub(r"\D", "", file.name)))
    content = load_pth(last)
    return {
        "numbers": numbers, "said": said, "kept": kept, "stored": stored, "files": files,
        "state": {part: content[part] for part in PARTS},
    }  # fmt: skip


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two outcomes are not the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {one!r} and {other!r}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, (a, b) in pairs for found in differences(a, b, f"{where}/{number}")]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def points_of(trace: Path) -> dict[str, int]:
    """The fault points of steps, samples, checkpoints and rows that were passed, and how often; caches are written only
    once."""
    found = Counter(trace.read_text().splitlines())
    files, rows = (
        ("step_N.pth", "step_N.manifest.json", "last_checkpoint"),
        ("row", "rotate", "commit", "end metrics", "end samples", "step", "sample"),
    )
    return {name: number for name, number in found.items() if name.endswith(files) or name.startswith(rows)}
