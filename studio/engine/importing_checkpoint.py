"""The engine verb `import_checkpoint`: a checkpoint of XTuner becomes one of ours, in a run of its own."""

from pathlib import Path
from typing import Any

from studio.engine.checkpoint import CheckpointFolder
from studio.engine.foreign import in_layout, in_our_format
from studio.engine.job import JobContext
from studio.engine.models.families import native
from studio.foreign.xtuner import open_checkpoint
from studio.models import model_fingerprint, require
from studio.paths import inside
from studio.store import open_db, runs

KEEP_ALL = 2**31


def run(job: JobContext) -> dict[str, Any]:
    """Args: path (an iter_N.pth, file or folder), base, config ("" or the path of its `.py`); the job has its run.

    Every weight is read and its checksum compared; what is written is a checkpoint as training writes them, in the
    number format that was trained, without the optimizer: it can be continued from, and not be resumed.
    """
    path, base = Path(job.args["path"]), str(job.args["base"])
    job.phase("reading the checkpoint")
    config = str(job.args.get("config") or "")
    found = open_checkpoint(path, Path(config).read_text(encoding="utf-8") if config else "")
    job.check_stop()
    content = in_our_format(found, base, None, job.run_id, model_fingerprint(require(base)))
    content = in_layout(content, native(require(base)))
    step = content["meta"]["step"]
    job.check_stop()
    job.phase("writing the checkpoint")
    folder = CheckpointFolder(job.folder, job.run_id, inside(job.folder, Path("runs", job.run_id)), KEEP_ALL)
    written = folder.save(step, content)
    with open_db(job.folder) as db:
        runs.update(db, job.run_id, step=step, num_steps=step)
    return {"checkpoint": written.relative_to(job.folder.resolve()).as_posix(), "step": step, "run_id": job.run_id}
