"""What the shell shows: tables, job progress, and errors. Colours only on a terminal; JSON on request."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from studio import jobs
from studio.errors import JobError
from studio.store import metrics, open_db
from studio.store.jobs import Job

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)
SHOWN_METRICS = ("train/loss", "valid/loss", "train/learning_rate", "train/tokens_per_second")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; cells are shown as text, whatever they hold."""
    view = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        view.add_row(*(escape(str(cell)) for cell in row))
    out.print(view)


def as_json(value: Any) -> None:
    """Print a value, dataclasses included, as JSON."""
    print(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def say(text: str) -> None:
    out.print(escape(text), highlight=False)


def fail(text: str) -> None:
    err.print(f"[red]error:[/red] {escape(text)}", highlight=False)


def follow(folder: Path, job: Job) -> Job:
    """Show a job's progress until it ends and return it. Ctrl-C asks it to stop and save; a second one kills it.

    Raises JobError with the cause when it failed or was lost.
    """
    asked = False
    while True:
        try:
            ended = _follow_once(folder, job)
            break
        except KeyboardInterrupt:
            if asked:
                jobs.kill(folder, job.id)
            else:
                say("Stopping at the next step and saving; press Ctrl-C again to kill.")
                jobs.stop(folder, job.id)
                asked = True
    if ended.state in ("failed", "lost"):
        raise JobError(f"{ended.title} {ended.state}: {ended.cause}", f"Log: {ended.log_path}")
    return ended


def _follow_once(folder: Path, job: Job) -> Job:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    if not sys.stdout.isatty():
        return _follow_plainly(folder, job)
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(job.title, total=None, numbers="")
        for current in jobs.watch(folder, job.id):
            description = f"{escape(current.title)}: {escape(current.phase or current.state)}"
            bar.update(
                task,
                description=description,
                completed=current.current,
                total=current.total or None,
                numbers=escape(_numbers(folder, current)),
            )
    return current


def _follow_plainly(folder: Path, job: Job) -> Job:
    """One line for each change of phase or tenth of the way: what a log file wants."""
    shown = None
    for current in jobs.watch(folder, job.id):
        tenth = 10 * current.current // current.total if current.total else 0
        if (current.phase, tenth) != shown:
            shown = (current.phase, tenth)
            amount = f" {current.current}/{current.total} {current.unit}" if current.total else ""
            say(f"{current.title}: {current.phase or current.state}{amount} {_numbers(folder, current)}".rstrip())
    return current


def _numbers(folder: Path, job: Job) -> str:
    """The newest metrics of a training job, in a few words."""
    if job.kind != "train":
        return ""
    with open_db(folder) as db:
        latest = metrics.latest(db, job.run_id)
    return "  ".join(f"{name.split('/')[-1]} {latest[name]:.4g}" for name in SHOWN_METRICS if name in latest)
