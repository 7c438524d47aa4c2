"""A job's progress in the shell: a bar and the newest numbers on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from studio.cli import show
from studio.cli.lazy import jobs, metrics, store, words
from studio.errors import JobError

if TYPE_CHECKING:
    from studio.store.jobs import Job

SHOWN_METRICS = ("train/loss", "valid/loss", "train/learning_rate", "train/tokens_per_second")
SHOWN_STEPS = 8
# A stop is a fine end for these; any other job that was stopped has not made what it was started for.
MAY_BE_STOPPED = ("train", "serve")


def follow(folder: Path, job: Job, quiet: bool = False) -> Job:
    """Show a job's progress until it ends and return it. Ctrl-C asks it to stop; a second one kills it.

    `quiet` shows nothing, so that only JSON reaches stdout.

    Raises JobError with the cause when it failed or was lost, or was stopped before its work was done.
    """
    asked = False
    while True:
        try:
            ended = _watch(folder, job, quiet)
            break
        except KeyboardInterrupt:
            _interrupt(folder, job, asked)
            asked = True
    if ended.state in ("failed", "lost"):
        raise JobError(f"{ended.title} {ended.state}: {words.told(ended.cause)}", f"Log: {ended.log_path}")
    if ended.state == "stopped" and ended.kind not in MAY_BE_STOPPED:
        raise JobError(f"{ended.title} was stopped; it left nothing behind.", "Start it again when you like.")
    return ended


def numbers_table(folder: Path, run_id: str, num_steps: int = SHOWN_STEPS) -> Table:
    """The newest steps of a run, one a line."""
    steps: dict[int, dict[str, float]] = {}
    with store.open_db(folder) as db:
        for name in SHOWN_METRICS:
            for point in metrics.series(db, run_id, name):
                if point.value is not None:
                    steps.setdefault(point.step, {})[name] = point.value
    newest = sorted(steps)[-num_steps:]
    header = ["step", *map(_label, SHOWN_METRICS)]
    return show.grid(header, [[step, *(_number(steps[step].get(name)) for name in SHOWN_METRICS)] for step in newest])


def _label(metric: str) -> str:
    """'learning rate' of train/learning_rate; there are two losses, which keep their whole names."""
    return metric if metric.endswith("/loss") else metric.partition("/")[2].replace("_", " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interrupt(folder: Path, job: Job, asked: bool) -> None:
    if asked:
        jobs.kill(folder, job.id)
        return
    how = "Stopping after this step, and saving" if job.kind == "train" else "Stopping"
    show.say(f"{how}; press Ctrl-C again to kill.")
    jobs.stop(folder, job.id)


def _watch(folder: Path, job: Job, quiet: bool) -> Job:
    if quiet:
        *_, ended = jobs.watch(folder, job.id)
        return ended
    return _watch_live(folder, job) if sys.stdout.isatty() else _watch_plainly(folder, job)


def _watch_live(folder: Path, job: Job) -> Job:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
    )
    task = bar.add_task(job.title, total=None, unit="")
    with Live(bar, console=show.out, transient=True, refresh_per_second=4) as live:
        for current in jobs.watch(folder, job.id):
            description = f"{current.title}: {current.phase or current.state}"
            bar.update(
                task,
                description=description,
                completed=current.current,
                total=current.total or None,
                unit=current.unit,
            )
            live.update(Group(bar, numbers_table(folder, job.run_id)) if job.kind == "train" else bar)
    return current


def _watch_plainly(folder: Path, job: Job) -> Job:
    """One line for each change of phase or tenth of the way: what a log file wants."""
    shown = None
    for current in jobs.watch(folder, job.id):
        tenth = 10 * current.current // current.total if current.total else 0
        if (current.phase, tenth) != shown:
            shown = (current.phase, tenth)
            amount = f" {current.current}/{current.total} {current.unit}" if current.total else ""
            line = f"{current.title}: {current.phase or current.state}{amount}  {_newest_numbers(folder, current)}"
            show.say(line.rstrip())
    return current


def _newest_numbers(folder: Path, job: Job) -> str:
    """The newest metrics of a training job, in a few words."""
    if job.kind != "train":
        return ""
    with store.open_db(folder) as db:
        latest = metrics.latest(db, job.run_id)
    return "  ".join(f"{_label(name)} {latest[name]:.4g}" for name in SHOWN_METRICS if name in latest)
