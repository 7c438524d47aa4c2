"""The engine verb `fetch`: bring a base model onto this machine, from wherever its name says."""

import time
from pathlib import Path
from typing import Any

from studio.engine.job import JobContext
from studio.engine.models.download import Progress
from studio.engine.models.hub import download_huggingface, download_modelscope
from studio.engine.models.starter import fetch_starter, only_one
from studio.models import BaseModel, require, resolve, write_manifest

STOP_CHECK_SECONDS = 1.0


def fetch(base: str, progress: Progress) -> Path:
    """The folder of a base model, downloaded when it is not there yet.

    `progress` gets (bytes done, bytes in total, what is being done) and may raise to stop; what has arrived is kept.
    Raises ModelError or DiskFullError with the next move.
    """
    model = resolve(base)
    if model.kind == "starter":
        return fetch_starter(progress)
    if not model.present and model.kind != "folder":
        with only_one(model.folder.name, progress):
            if not resolve(base).present:
                _from_hub(model, progress)
    return require(base)


def run(job: JobContext) -> dict[str, Any]:
    """The job: args {"base": ...}; its result is {"folder": ..., "base": ...}."""
    base = job.args["base"]
    return {"base": base, "folder": str(fetch(base, _JobProgress(job)))}


def _from_hub(model: BaseModel, progress: Progress) -> None:
    download = download_huggingface if model.kind == "huggingface" else download_modelscope
    source = download(model.id, model.folder, progress)
    write_manifest(model.folder, model.kind, model.id, source)


class _JobProgress:
    """Writes progress into the job's row, and lets a stop request end the download."""

    def __init__(self, job: JobContext) -> None:
        self.job = job
        self.what = ""
        self.checked_at = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        if what != self.what:
            self.what = what
            self.job.phase(what, total, "bytes")
        self.job.progress(done, total, "bytes")
        if time.monotonic() - self.checked_at > STOP_CHECK_SECONDS:
            self.checked_at = time.monotonic()
            self.job.check_stop()
