"""The engine verb `import_checkpoint`: a checkpoint of XTuner becomes one of ours, in a run of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlite_utils import Database

from studio.config.schema import RunConfig
from studio.config.yaml import save_config
from studio.engine.checkpoint import CheckpointFolder
from studio.engine.foreign import in_layout, in_our_format
from studio.engine.job import JobContext, may_live
from studio.engine.models.families import native
from studio.foreign.xtuner import open_checkpoint
from studio.models import model_fingerprint, require
from studio.paths import inside, remove, slugify
from studio.store import jobs, open_db, runs
from studio.store.runs import CONFIG_FILE, LOCK_FILE, UNFINISHED, Run

KEEP_ALL = 2**31


def run(job: JobContext) -> dict[str, Any]:
    """Args: path (an iter_N.pth, file or folder), base, name of the run, config ("" or the path of its `.py`).

    Every weight is read and its checksum compared; what is written is a checkpoint as training writes them, in the
    number format that was trained, without the optimizer: it can be continued from, and not be resumed. The run is
    listed once all of it is written, and is gone again when it cannot be; what a killed import left, the next removes.
    """
    path, base = Path(job.args["path"]), str(job.args["base"])
    job.phase("reading the checkpoint")
    config = str(job.args.get("config") or "")
    found = open_checkpoint(path, Path(config) if config else None)
    job.check_stop()
    content = in_our_format(found, base, None, "", model_fingerprint(require(base)))
    content = in_layout(content, native(require(base)))
    step = content["meta"]["step"]
    job.check_stop()
    frozen = found.run_config(base, slugify(str(job.args.get("name") or "") or found.name or path.stem))
    with _new_run(job, frozen, step, found.facts()) as run_id:
        content["meta"]["run_id"] = run_id
        job.phase("writing the checkpoint")
        folder = CheckpointFolder(job.folder, run_id, inside(job.folder, Path("runs", run_id)), KEEP_ALL)
        written = folder.save(step, content)
    return {"checkpoint": written.relative_to(job.folder.resolve()).as_posix(), "step": step, "run_id": run_id}


@contextmanager
def _new_run(job: JobContext, config: RunConfig, step: int, facts: dict[str, Any]) -> Iterator[str]:
    """The id of a run that is listed, and stays, only if nothing goes wrong in the block."""
    with FileLock(inside(job.folder, LOCK_FILE), timeout=30), open_db(job.folder) as db:
        _sweep(job.folder, db)
        run_id = runs.next_id(db, config.name)
        detail = {"imported": facts, UNFINISHED: True}
        run = Run(run_id, config.name, config.model.base, config.method, job.id, detail=detail)
        run.step = run.num_steps = step
        runs.add(db, run)
    try:
        run_dir = inside(job.folder, Path("runs", run_id))
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(run_dir / CONFIG_FILE, config)
        yield run_id
        with open_db(job.folder) as db:
            runs.note(db, run_id, **{UNFINISHED: False})
    except BaseException:
        with open_db(job.folder) as db:
            _forget(job.folder, db, run_id)
        raise


def _sweep(folder: Path, db: Database) -> None:
    """Remove what imports that were killed had begun."""
    live = {each.id for each in jobs.listed(db, jobs.LIVE_STATES) if may_live(each)}
    for run in runs.unfinished(db):
        if run.job_id not in live:
            _forget(folder, db, run.id)


def _forget(folder: Path, db: Database, run_id: str) -> None:
    """The folder first: a run that is not listed and has a row is found by the next sweep."""
    remove(inside(folder, Path("runs", run_id)))
    runs.remove(db, run_id)
