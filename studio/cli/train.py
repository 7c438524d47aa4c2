"""`retune train`: start a run, or go on with one, and watch it."""

from typing import Annotated

import typer

from studio import runs
from studio.cli import show
from studio.cli.config import find_config
from studio.cli.options import ProjectOption, chosen
from studio.config.yaml import with_settings
from studio.projects import Project
from studio.store import open_db
from studio.store import runs as store_runs


def train(
    config: Annotated[str, typer.Argument(help="A config by name or file, a preset, or a run to resume.")],
    project: ProjectOption = "",
    resume: Annotated[str, typer.Option(help="auto, or a checkpoint of the run (step_40.pth).")] = "",
    set: Annotated[list[str] | None, typer.Option(help="A setting, as train.num_steps=40; again for more.")] = None,
    detach: Annotated[bool, typer.Option(help="Do not wait; the run goes on by itself.")] = False,
) -> None:
    """Train. The run is a process of its own: it goes on when this command is detached or its window closed.

    Example: retune train starter_lora --set train.num_steps=40

    With --resume, CONFIG is a run (starter_lora-1), or a config whose newest run is resumed.
    """
    workspace = chosen(project)
    if resume:
        run_id = _run_of(workspace, config)
        job = runs.resume_run(workspace, run_id, resume)
    else:
        run, job = runs.start_run(workspace, with_settings(find_config(config, workspace.slug), set or []))
        run_id = run.id
    show.say(f"Run {run_id} of project {workspace.slug}; log: {job.log_path}")
    if detach:
        return
    ended = show.follow(workspace.folder, job)
    show.say(f"{run_id} {ended.state} at step {runs.get_run(workspace, run_id).step}. {ended.cause}".rstrip())
    if checkpoint := ended.result.get("checkpoint"):
        show.say(f"Checkpoint: {workspace.folder / checkpoint}")


def _run_of(project: Project, name: str) -> str:
    """A run by its id, else the newest run of a config of that name."""
    with open_db(project.folder) as db:
        listed = store_runs.listed(db)
        named = [run.id for run in listed if name in (run.id, run.name)]
        return named[0] if named else store_runs.get(db, name).id
