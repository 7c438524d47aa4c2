"""`retune train`: start a run, or go on with one, and watch it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.config import find_config, with_settings
from studio.cli.data import fetch_data
from studio.cli.follow import follow, numbers_table
from studio.cli.lazy import runs, words
from studio.cli.options import ProjectOption, SetOption, chosen
from studio.cli.spread import DeepspeedOption, LauncherOption, SbatchOption, asked, spread_out, write_sbatch
from studio.errors import JobError

if TYPE_CHECKING:
    from studio.config.schema import RunConfig
    from studio.projects import Project
    from studio.store.jobs import Job

DetachOption = Annotated[bool, typer.Option("--detach", help="Do not wait; the run goes on by itself.")]


def train(
    config: Annotated[str, typer.Argument(help="A config of the project, a file, or a preset; a run with --resume.")],
    project: ProjectOption = "",
    continue_from: Annotated[
        str,
        typer.Option(
            "--continue-from",
            "--resume-weights",
            help="Begin with these weights: an adapter folder, a .pth (XTuner's too), a run, RUN:STEP; optimizer "
            "and place in the data begin anew.",
        ),
    ] = "",
    resume: Annotated[str, typer.Option(help="auto, or a checkpoint of the run (step_40.pth).")] = "",
    set: SetOption = None,
    launcher: LauncherOption = "",
    deepspeed: DeepspeedOption = "",
    print_sbatch: SbatchOption = False,
    detach: DetachOption = False,
    allow_lint_errors: Annotated[
        bool, typer.Option("--allow-lint-errors", help="Start although rows have errors; they are recorded.")
    ] = False,
) -> None:
    """Train. The run is a process of its own: it goes on when this command is detached or its window closed.

    With --resume, CONFIG is a run (starter_lora-1), or a config whose newest run is resumed. Ctrl-C stops the run
    at its next step and saves; a second one kills it. A run that goes on from an earlier checkpoint
    gives up its later ones. With --continue-from a new run begins with weights of any origin (an adapter folder, a
    `.pth` of XTuner, a run), and its adapter has their shape: the way where a run cannot be resumed, for another batch
    size or packing.

    Several processes: NPROC_PER_NODE=2 retune train CONFIG, with --deepspeed zero2 to share out memory too; a resumed
    run may be spread anew. See docs/scale.md.

    Example: retune train starter_lora --set train.num_steps=40
    """
    workspace = chosen(project)
    if resume:
        if continue_from:
            raise JobError("--resume goes on with a run, --continue-from begins a new one.", "Give one of the two.")
        if set:
            raise JobError("A resumed run keeps the config it began with.", "Leave --set out, or start a new run.")
        return resume_run(workspace, _run_of(workspace, config), resume, detach, launcher, deepspeed)
    found = spread_out(with_settings(find_config(config, workspace), set), launcher, deepspeed)
    if print_sbatch:
        return write_sbatch(workspace, found)
    if continue_from:
        begun = found.model.model_copy(update={"continue_from": runs.beginning(workspace, continue_from)})
        found = found.model_copy(update={"model": begun})
    if sys.stdin.isatty():
        offer_data(workspace, found)
    run, job = runs.start_run(workspace, found, allow_lint_errors)
    return _watch(workspace, run.id, job, detach)


def offer_data(workspace: Project, config: RunConfig) -> None:
    """Ask whether to get the datasets that the project lacks and the config says where to find; get them."""
    missing = runs.missing_recipes(workspace, config) if config.task == "sft" else {}
    if not missing:
        return
    for name, recipe in missing.items():
        show.say(f"Dataset {name} is not in project {workspace.slug} yet; the config gets it from {recipe.source}.")
    if typer.confirm("Get it now?" if len(missing) == 1 else "Get them now?", default=True):
        fetch_data(workspace, config)


def resume_run(
    workspace: Project, run_id: str, checkpoint: str, detach: bool, launcher: str = "", deepspeed: str = ""
) -> None:
    """Go on with a run from `auto` (its newest sound checkpoint) or a checkpoint of it, and watch."""
    spread = asked(runs.run_config(workspace, run_id).distributed, launcher, deepspeed)
    job = runs.resume_run(workspace, run_id, _checkpoint_of(workspace, run_id, checkpoint), spread)
    _watch(workspace, run_id, job, detach)


def _watch(workspace: Project, run_id: str, job: Job, detach: bool) -> None:
    show.say(f"Run {run_id} of project {workspace.slug}; log: {job.log_path}")
    if detach:
        return show.say(f"It goes on by itself. Look: retune runs show {run_id} --project {workspace.slug}")
    ended = follow(workspace.folder, job)
    if elsewhere := ended.result.get("elsewhere"):
        return show.say(f"\n{run_id} {ended.state}. {elsewhere}")
    show.out.print(numbers_table(workspace.folder, run_id))
    done = runs.get_run(workspace, run_id)
    show.say(f"\n{run_id} {ended.state} at step {done.step}/{done.num_steps}. {words.told(ended.cause)}".rstrip())
    if early := ended.result.get("early_stop"):
        show.say(early)
    if checkpoint := ended.result.get("checkpoint"):
        show.say(f"Checkpoint: {workspace.folder / checkpoint}")
    if best := ended.result.get("best_step"):
        show.say(f"The best one: step_{best}.pth")
    if ended.state == "stopped":
        return show.say(f"Go on: retune runs resume {run_id} --project {workspace.slug}")
    return show.say(f"Next: retune evaluate {run_id} --project {workspace.slug}")


def _run_of(project: Project, name: str) -> str:
    """A run by its id, else the newest run of the config of that name (or of that file's name)."""
    found = runs.list_runs(project)
    wanted = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    named = [run.id for run in found if run.id == name] or [run.id for run in found if run.name == wanted]
    return named[0] if named else runs.get_run(project, name).id


def _checkpoint_of(project: Project, run_id: str, text: str) -> str:
    """`auto`, or a checkpoint's path relative to the project: typed as a file, or as its name among the run's."""
    if text == "auto":
        return text
    folder = runs.run_folder(project, run_id)
    path = folder / text if Path(text).name == text else Path(text).resolve()
    if path.parent.resolve() != folder.resolve():
        raise JobError(f"{text!r} is no checkpoint of run {run_id}.", f"`retune checkpoints list {run_id}` shows them.")
    if not path.exists():
        raise JobError(f"There is no checkpoint {text!r}.", f"`retune checkpoints list {run_id}` shows what there is.")
    return project.relative(path)
