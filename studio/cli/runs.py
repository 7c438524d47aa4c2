"""`retune runs`: what was trained, and what is being trained."""

from typing import Annotated

import typer

from studio import jobs, runs
from studio.cli import show
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import JobError
from studio.paths import human_bytes
from studio.store import checkpoints, metrics, open_db, samples

app = typer.Typer(help="Runs of a project.", no_args_is_help=True)


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List runs, newest first."""
    found = runs.list_runs(chosen(project))
    if json:
        return show.as_json(found)
    if not found:
        show.say("No runs yet. Start one: retune train starter_lora")
    rows = [(r.id, r.method, r.base, r.state, f"{r.step}/{r.num_steps}", r.created_at[:16], r.cause) for r in found]
    show.table(["run", "method", "base", "state", "step", "created", "cause"], rows)
    return None


@app.command("show")
def show_(run: str, json: JsonOption = False, project: ProjectOption = "") -> None:
    """Show a run: state, newest numbers, checkpoints, samples."""
    workspace = chosen(project)
    found = runs.get_run(workspace, run)
    with open_db(workspace.folder) as db:
        latest, kept, texts = metrics.latest(db, run), checkpoints.listed(db, run), samples.listed(db, run)
    if json:
        return show.as_json({"run": found, "metrics": latest, "checkpoints": kept, "samples": texts})
    show.say(f"{found.id}: {found.state} at step {found.step}/{found.num_steps}. {found.cause}".rstrip())
    show.table(["metric", "newest"], [(name, f"{value:.5g}") for name, value in latest.items()])
    show.table(["checkpoint", "size"], [(c.path, human_bytes(c.size_bytes)) for c in kept])
    show.table(["step", "prompt", "sample"], [(s.step, s.prompt, s.text or s.error) for s in texts])
    return None


@app.command()
def stop(
    run: str,
    discard: Annotated[bool, typer.Option(help="Stop without saving a checkpoint.")] = False,
    kill: Annotated[bool, typer.Option(help="End the process at once.")] = False,
    project: ProjectOption = "",
) -> None:
    """Stop a run at its next step, saving a checkpoint."""
    workspace = chosen(project)
    found = runs.get_run(workspace, run)
    if not found.job_id or not jobs.get(workspace.folder, found.job_id).live:
        raise JobError(f"Run {run} is {found.state or 'not started'}.", "Only a running run can be stopped.")
    if kill:
        jobs.kill(workspace.folder, found.job_id)
    else:
        jobs.stop(workspace.folder, found.job_id, save=not discard)
    show.say(f"{run}: {'killed' if kill else 'asked to stop'}")
