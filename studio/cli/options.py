"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from studio import models
from studio.cli.lazy import checkpoints, projects, runs, store
from studio.errors import CheckpointError, ProjectError
from studio.paths import typed_path

if TYPE_CHECKING:
    from studio.projects import Project

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ProjectOption = Annotated[
    str, typer.Option("--project", "-p", help="Project by slug or name; the newest one when left out.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A setting, as train.num_steps=40; may be given again.", metavar="KEY=VALUE"),
]
ColumnsOption = Annotated[str, typer.Option(help="Which column is what: question=Q,answer=A; also system=S,history=H.")]
StepOption = Annotated[int, typer.Option(min=0, help="The checkpoint's step; the newest when left out.")]
ShardOption = Annotated[str, typer.Option(help="Largest file, as 2GB or 500MB.")]


def chosen(name: str) -> Project:
    """The project that `--project` names, else the newest one. Raises ProjectError when there is none."""
    if not name and (found := projects.list_projects()):
        return found[0]
    if not name:
        raise ProjectError("There is no project yet.", "Make one with `retune project new NAME`, or run `retune demo`.")
    return projects.open_project(name)


def base_model(text: str) -> str:
    """A base model as typed in a shell: a folder counts from where the person stands, all else stays as it is."""
    is_folder = text != models.STARTER and text and typed_path(text).is_dir()
    return str(typed_path(text).resolve()) if is_folder else text


def checkpoint_step(project: Project, run: str, step: int = 0) -> int:
    """`step`, or the newest one with a checkpoint when it is 0. Raises JobError, CheckpointError."""
    runs.get_run(project, run)
    with store.open_db(project.folder) as db:
        if step:
            return checkpoints.get(db, run, step).step
        steps = [checkpoint.step for checkpoint in checkpoints.listed(db, run)]
    if not steps:
        raise CheckpointError(f"Run {run!r} has no checkpoint yet.", f"`retune runs show {run}` shows how far it is.")
    return max(steps)


def languages(text: str) -> tuple[str, ...]:
    """`en,zh` as a tuple."""
    return tuple(part for part in re.split(r"[,\s]+", text) if part)
