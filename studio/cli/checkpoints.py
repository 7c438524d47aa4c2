"""`retune checkpoints`: what a run saved, and whether it is still what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import checkpoint_files, checkpoints, runs, store
from studio.cli.options import JsonOption, ProjectOption, StepOption, checkpoint_step, chosen
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.projects import Project

app = group("Checkpoints of a project's runs.")
RunArgument = Annotated[str, typer.Argument(help="The run, as starter_lora-1.")]


@app.command("list")
def list_(
    run: Annotated[str, typer.Argument(help="Only this run's; all when left out.")] = "",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """List checkpoints, newest first.

    Example: retune checkpoints list starter_lora-1
    """
    workspace = chosen(project)
    if run:
        runs.get_run(workspace, run)
    with store.open_db(workspace.folder) as db:
        found = checkpoints.listed(db, run)
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No checkpoints yet. A run saves one at its end: retune train starter_lora")
    rows = [(c.run_id, c.step, human_bytes(c.size_bytes), c.created_at[:16], workspace.path(c.path)) for c in found]
    return show.table(["run", "step", "size", "created", "file"], rows)


@app.command()
def verify(run: RunArgument, step: StepOption = 0, project: ProjectOption = "") -> None:
    """Read every byte of a checkpoint and compare it with its manifest; exit code 1 when it changed.

    Example: retune checkpoints verify starter_lora-1 --step 60
    """
    workspace = chosen(project)
    path = _file(workspace, run, checkpoint_step(workspace, run, step))
    if found := checkpoint_files.verify(path):
        show.fail(f"{path.name}: {found}.")
        raise typer.Exit(1)
    show.say(f"{path.name} is what was saved.")


@app.command()
def delete(
    run: RunArgument,
    step: Annotated[int, typer.Option(min=1, help="The checkpoint's step.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    project: ProjectOption = "",
) -> None:
    """Delete one checkpoint; what was converted from it stays.

    Example: retune checkpoints delete starter_lora-1 --step 40 --yes
    """
    workspace = chosen(project)
    path = _file(workspace, run, checkpoint_step(workspace, run, step))
    if not yes:
        typer.confirm(f"Delete {path}?", abort=True)
    runs.delete_checkpoint(workspace, run, step)
    show.say(f"Deleted {path.name} of {run}.")


def _file(workspace: Project, run: str, step: int) -> Path:
    with store.open_db(workspace.folder) as db:
        return workspace.path(checkpoints.get(db, run, step).path)
