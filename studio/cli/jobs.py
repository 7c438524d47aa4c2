"""`retune jobs`: what runs or waits on this machine, in all projects: order, hold, cancel, try again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import jobs, runs, words
from studio.cli.options import JsonOption
from studio.errors import JobError

if TYPE_CHECKING:
    from studio.store.jobs import Job

app = group("Jobs of this machine: what runs, and what waits in line.")
JobArgument = Annotated[str, typer.Argument(help="The job, as `retune jobs list` names it.")]


@app.command("list")
def list_(
    json: JsonOption = False,
    all: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
) -> None:
    """List the jobs of all projects: those at work, then those that wait, in their order.

    Example: retune jobs list
    """
    found = jobs.all_jobs() if all else jobs.live_jobs()
    if json:
        return show.as_json([{"project": folder.name, "job": job} for folder, job in found])
    if not found:
        return show.say("Nothing runs.")
    return show.table(["job", "project", "what", "state", "progress"], [_row(folder, job) for folder, job in found])


@app.command()
def stop(
    job: JobArgument,
    discard: Annotated[
        bool, typer.Option("--discard", help="Let a training stop without saving a checkpoint.")
    ] = False,
    kill: Annotated[bool, typer.Option("--kill", help="End the process at once.")] = False,
) -> None:
    """Ask a job to stop; a training saves a checkpoint first. One that waits leaves the line.

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


@app.command()
def move(job: JobArgument, where: Annotated[str, typer.Argument(help="up, down, first or last.")]) -> None:
    """Move a job that waits in line: one place up or down, to the front or to the end.

    Example: retune jobs move 20260101T120000000000-a1b2c3 first
    """
    jobs.move(jobs.find(job), job, where)
    show.say(f"{job}: moved {where}")


@app.command()
def hold(job: JobArgument) -> None:
    """Hold a job that waits: others pass it until it is released.

    Example: retune jobs hold 20260101T120000000000-a1b2c3
    """
    jobs.hold(jobs.find(job), job)
    show.say(f"{job}: held")


@app.command()
def release(job: JobArgument) -> None:
    """Let a held job take its turn again.

    Example: retune jobs release 20260101T120000000000-a1b2c3
    """
    jobs.hold(jobs.find(job), job, held=False)
    show.say(f"{job}: released")


@app.command()
def retry(job: JobArgument) -> None:
    """Try a job again that has ended; a training goes on from its newest sound checkpoint.

    Example: retune jobs retry 20260101T120000000000-a1b2c3
    """
    again = runs.retry(jobs.find(job), job)
    show.say(f"{job}: tried again as {again.id}; log: {again.log_path}")


def _row(folder: Path, job: Job) -> tuple[str, ...]:
    done = f" {job.current}/{job.total} {job.unit}" if job.total else ""
    state = "held" if job.waiting and job.held else job.state
    return job.id, folder.name, job.title, state, f"{job.phase}{done}" if job.live else words.told(job.cause)
