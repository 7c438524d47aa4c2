"""`retune checkpoints`: what a run saved, whether it is still what was saved, and checkpoints from elsewhere."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.group import group
from studio.cli.lazy import checkpoint_files, checkpoints, runs, store, xtuner
from studio.cli.options import JsonOption, ProjectOption, StepOption, base_model, checkpoint_step, chosen
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.projects import Project

app = group("Checkpoints of a project's runs.")
CELL_WIDTH = 80
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
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A .pth of XTuner or of ours, a folder of DeepSpeed, or XTuner's work folder.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every weight with its shape.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what is in a checkpoint that someone else wrote. Nothing in it runs, and no weight is read.

    Of a work folder of XTuner, or of the folder that holds them, all checkpoints are listed.

    Example: retune checkpoints inspect work_dirs/my_run/iter_96.pth
    """
    if path.is_dir() and not xtuner.is_checkpoint(path) and (inside := xtuner.checkpoints_in(path)):
        return _list_theirs(path, inside, json)
    found = xtuner.open_checkpoint(path)
    weights = [(name, weight.dtype, "×".join(map(str, weight.shape))) for name, weight in found.weights.items()]
    if json:
        return show.as_json(found.facts() | ({"weights": weights} if tensors else {}))
    facts = {key: value for key, value in found.facts().items() if value not in ("", None, [], {})}
    show.table(["", path.name], [(key, _words(value)) for key, value in facts.items()])
    if tensors:
        show.table(["weight", "format", "shape"], weights)
    return None


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A .pth of XTuner (iter_96.pth), or a folder of DeepSpeed.")],
    base: Annotated[str, typer.Option(help="Its base model, where the one in its config is not here.")] = "",
    name: Annotated[str, typer.Option(help="Name of the run; its folder's when left out.")] = "",
    config: Annotated[Path | None, typer.Option(help="The .py it was trained with; it is read and never run.")] = None,
    project: ProjectOption = "",
) -> None:
    """Bring a checkpoint of XTuner into a project, as a run of its own: convert, compare, score, continue from it.

    Example: retune checkpoints import work_dirs/my_run/iter_96.pth --base internlm/internlm2_5-1_8b-chat
    """
    workspace = chosen(project)
    job = runs.import_checkpoint(workspace, path, base_model(base) if base else "", name, config)
    result = follow(workspace.folder, job).result
    show.say(f"{path.name} is step {result['step']} of run {result['run_id']} in project {workspace.slug}.")
    show.say(f"Next: retune evaluate {result['run_id']}, or retune train CONFIG --continue-from {result['run_id']}")


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


def _list_theirs(folder: Path, found: list[Path], as_json: bool) -> None:
    facts = [xtuner.open_checkpoint(path).facts() for path in found]
    if as_json:
        return show.as_json(facts)
    rows = [
        (path.relative_to(folder), each["method"], each["iteration"], each["step"] or "?", _loss(each["last loss"]),
         human_bytes(each["file bytes"]))
        for path, each in zip(found, facts, strict=True)
    ]  # fmt: skip
    return show.table(["checkpoint", "method", "iteration", "step", "loss", "size"], rows)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _words(value: object) -> str:
    """A value for a cell of a table; what is long stands on several lines."""
    if isinstance(value, dict):
        value = [f"{key} {each}" for key, each in value.items()]
    if isinstance(value, list):
        return textwrap.fill(", ".join(map(str, value)), CELL_WIDTH, break_long_words=False)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file(workspace: Project, run: str, step: int) -> Path:
    with store.open_db(workspace.folder) as db:
        return workspace.path(checkpoints.get(db, run, step).path)
