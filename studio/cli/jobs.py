"""`retune jobs`: what runs or waits on this machine, in all projects, and how to stop it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import jobs
from studio.cli.options import JsonOption
from studio.errors import JobError

if TYPE_CHECKING:
    from studio.store.jobs import Job

app = group("Jobs of this machine: what runs, and what waits in line.")


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the jobs of all projects that run or wait, oldest first.

    Example: retune jobs list
    """
    found = jobs.live_jobs()
    if json:
        return show.as_json([{"project": folder.name, "job": job} for folder, job in found])
    if not found:
        return show.say("Nothing runs.")
    return show.table(["job", "project", "what", "state", "progress"], [_row(folder, job) for folder, job in found])


@app.command()
def stop(
    job: Annotated[str, typer.Argument(help="The job, as `retune jobs list` names it.")],
    discard: Annotated[
        bool, typer.Option("--discard", help="Let a training stop without saving a checkpoint.")
    ] = False,
    kill: Annotated[bool, typer.Option("--kill", help="End the process at once.")] = False,
) -> None:
    """Ask a job to stop; a training saves a checkpoint first.

    Example: retune jobs stop 20260101T120000000000-a1b2c3
    """
    found = next((folder for folder, live in jobs.live_jobs() if live.id == job), None)
    if found is None:
        raise JobError(f"No job {job!r} runs or waits.", "`retune jobs list` shows those that do.")
    if kill:
        jobs.kill(found, job)
    else:
        jobs.stop(found, job, save=not discard)
    show.say(f"{job}: {'killed' if kill else 'asked to stop'}")


def _row(folder: Path, job: Job) -> tuple[str, ...]:
    done = f" {job.current}/{job.total} {job.unit}" if job.total else ""
    return job.id, folder.name, job.title, job.state, f"{job.phase}{done}"
