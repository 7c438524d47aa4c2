"""`retune runs`: what was trained, and what is being trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import numbers_table
from studio.cli.group import group
from studio.cli.lazy import checkpoints, event_words, jobs, metrics, run_events, runs, samples, store, words
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.cli.train import DetachOption, resume_run
from studio.errors import JobError
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.projects import Project

app = group("Runs of a project.")
RunArgument = Annotated[str, typer.Argument(help="The run, as starter_lora-1.")]


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List runs, newest first.

    Example: retune runs list --json
    """
    found = runs.list_runs(chosen(project))
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No runs yet. Start one: retune train starter_lora")
    rows = [
        (r.id, r.method, r.base, r.state, f"{r.step}/{r.num_steps}", r.created_at[:16], words.told(r.cause))
        for r in found
    ]
    return show.table(["run", "method", "base", "state", "step", "created", "cause"], rows)


@app.command("show")
def show_(run: RunArgument, json: JsonOption = False, project: ProjectOption = "") -> None:
    """Show a run: state, newest numbers, checkpoints, samples.

    Example: retune runs show starter_lora-1
    """
    workspace = chosen(project)
    found = runs.get_run(workspace, run)
    with store.open_db(workspace.folder) as db:
        latest, kept, texts = metrics.latest(db, run), checkpoints.listed(db, run), samples.listed(db, run)
        happened = run_events.listed(db, run)
    if json:
        told = {"run": found, "metrics": latest, "checkpoints": kept, "samples": texts, "events": happened}
        return show.as_json(told)
    show.say(f"{found.id}: {found.state} at step {found.step}/{found.num_steps}. {words.told(found.cause)}".rstrip())
    for name, rows in found.detail.get("datasets", {}).items():
        show.say(f"Rows: {name}, version {rows['version']} ({rows['fingerprint'][:12]})")
    for error in found.detail.get("started_despite", []):
        show.say(f"Started despite: {error}")
    for alike in event_words.together(happened):
        show.say(event_words.sentence(alike))
    show.say("")
    show.out.print(numbers_table(workspace.folder, run))
    show.say("")
    sizes = [(c.path, human_bytes(c.size_bytes), _best(c.is_best, c.score_name, c.score)) for c in kept]
    show.table(["checkpoint", "size", "best"], sizes)
    for sample in texts:
        show.say(f"\nstep {sample.step}, {sample.prompt}\n  {sample.text or sample.error}")
    return None


def _best(is_best: int, name: str, score: float | None) -> str:
    return f"{name.replace('_', ' ')} {score:.4g}" if is_best and score is not None else ""


@app.command()
def log(
    run: RunArgument,
    lines: Annotated[int, typer.Option(min=1, help="How many lines from the end.")] = 40,
    project: ProjectOption = "",
) -> None:
    """Print the end of a run's log.

    Example: retune runs log starter_lora-1 --lines 100
    """
    workspace = chosen(project)
    runs.get_run(workspace, run)
    show.say(jobs.tail(runs.run_folder(workspace, run) / "run.log", lines))


@app.command()
def stop(
    run: RunArgument,
    discard: Annotated[bool, typer.Option("--discard", help="Stop without saving a checkpoint.")] = False,
    kill: Annotated[bool, typer.Option("--kill", help="End the process at once.")] = False,
    project: ProjectOption = "",
) -> None:
    """Stop a run at its next step, saving a checkpoint.

    Example: retune runs stop starter_lora-1
    """
    workspace = chosen(project)
    job_id = _live_job(workspace, run)
    if kill:
        jobs.kill(workspace.folder, job_id)
    else:
        jobs.stop(workspace.folder, job_id, save=not discard)
    show.say(f"{run}: {'killed' if kill else 'asked to stop'}")


@app.command()
def save(run: RunArgument, project: ProjectOption = "") -> None:
    """Ask a running run for a checkpoint at its next step.

    Example: retune runs save starter_lora-1
    """
    _ask(run, project, "save")


@app.command()
def sample(run: RunArgument, project: ProjectOption = "") -> None:
    """Ask a running run for samples at its next step.

    Example: retune runs sample starter_lora-1
    """
    _ask(run, project, "sample")


@app.command()
def resume(run: RunArgument, detach: DetachOption = False, project: ProjectOption = "") -> None:
    """Go on with a run from its newest sound checkpoint; the same as `retune train RUN --resume auto`.

    Example: retune runs resume starter_lora-1
    """
    resume_run(chosen(project), run, "auto", detach)


def _ask(run: str, project: str, what: str) -> None:
    workspace = chosen(project)
    jobs.request(workspace.folder, _live_job(workspace, run), what)
    show.say(f"{run}: asked to {what} at its next step")


def _live_job(workspace: Project, run: str) -> str:
    """The job of a run that goes on. Raises JobError for one that does not."""
    found = runs.get_run(workspace, run)
    if not found.job_id or not jobs.get(workspace.folder, found.job_id).live:
        raise JobError(f"Run {run} is {found.state or 'not started'}.", "Only a run that is going on can be asked.")
    return found.job_id
