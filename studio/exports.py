"""Files for other tools, made from a checkpoint: what there is to choose, starting one, and what was exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio import jobs, runs
from studio.errors import JobError
from studio.paths import slugify
from studio.projects import Project
from studio.store import checkpoints as store
from studio.store import open_db
from studio.store.checkpoints import Output
from studio.store.jobs import Job

GGUF_FORMATS = ("f16", "bf16", "q8_0", "f32")


@dataclass(frozen=True)
class Choice:
    """What an export is made with. `kind`: gguf. `format`: how weights are stored in the files."""

    kind: str
    format: str = "f16"
    overwrite: bool = False

    def args(self) -> dict[str, Any]:
        return {"kind": self.kind, "format": self.format, "overwrite": self.overwrite}


def folder_of(project: Project, name: str) -> Path:
    """Where an export of that name lies. Raises JobError for a name that is none of a folder."""
    if slugify(name).replace("-", "_") != name.replace("-", "_"):
        raise JobError(f"{name!r} cannot name a folder.", f"For example {slugify(name)!r}.")
    return project.path("exports", name)


def default_name(run_id: str, step: int, choice: Choice) -> str:
    return f"{run_id}-step_{step}-{choice.kind}"


def start(project: Project, run_id: str, step: int, choice: Choice, name: str = "", out: Path | None = None) -> Job:
    """Export a checkpoint of a run, in a job: into `exports/name` of the project, or into the folder `out`."""
    run = runs.get_run(project, run_id)
    out = out or folder_of(project, name or default_name(run.id, step, choice))
    args = {"run_id": run.id, "step": step, "out": str(out)} | choice.args()
    return jobs.start(project.folder, "export", args, title=f"export {run.id} step {step}", run_id=run.id)


def start_of_folder(folder: Path, weights: Path, base: str, out: Path, choice: Choice) -> Job:
    """Export an adapter or a model that lies in a folder, in a job of `folder`."""
    args = {"weights": str(weights), "base": base, "out": str(out)} | choice.args()
    return jobs.start(folder, "export", args, title=f"export {weights.name}")


def listed(project: Project, run_id: str = "", step: int = 0) -> Sequence[Output]:
    """What was exported (from one checkpoint, where it is named), newest first."""
    with open_db(project.folder) as db:
        found = store.outputs(db, "export")
    return [each for each in found if not run_id or (each.run_id, each.step) == (run_id, step)]
