"""The record of a training run. Its state is the state of its newest job; its config lies in its folder."""

import json
from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import JobError
from studio.store.records import now, select, to_row, writing

CONFIG_FILE = "config.yaml"  # in the run's folder
LOCK_FILE = ".runs.lock"  # in the project's folder, held while a run gets its id


@dataclass
class Run:
    """`step` is the last finished step of `num_steps`; `state` and `cause` come from the job."""

    id: str
    name: str
    base: str
    method: str
    job_id: str = ""
    created_at: str = field(default_factory=now)
    num_steps: int = 0
    step: int = 0
    detail: dict[str, Any] = field(default_factory=dict)
    archived_at: str = ""
    state: str = ""
    phase: str = ""
    cause: str = ""


UNFINISHED = "unfinished"  # in the detail of a run while it is brought in: it is listed once all of it is there
SELECT = "select runs.*, jobs.state, jobs.phase, jobs.cause from runs left join jobs on jobs.id = runs.job_id"
DERIVED = ("state", "phase", "cause")


def add(db: Database, run: Run) -> Run:
    row = {key: value for key, value in to_row(run).items() if key not in DERIVED}
    db.table("runs").insert(row)
    return run


def get(db: Database, run_id: str) -> Run:
    """Raises JobError, naming the runs there are, when there is none of that id."""
    found = select(db, Run, f"{SELECT} where runs.id = ?", [run_id])
    if not found:
        names = ", ".join(run.id for run in listed(db)[:8]) or "none yet"
        raise JobError(f"There is no run {run_id!r} in this project.", f"Runs here: {names}.")
    return found[0]


def listed(db: Database) -> list[Run]:
    """Runs that are whole and not archived, newest first."""
    found = select(db, Run, f"{SELECT} where coalesce(runs.archived_at, '') = '' order by runs.created_at desc")
    return [run for run in found if not run.detail.get(UNFINISHED)]


def unfinished(db: Database) -> list[Run]:
    """Runs that are being brought in; those whose job is gone will never be whole."""
    return [run for run in select(db, Run, SELECT) if run.detail.get(UNFINISHED)]


def update(db: Database, run_id: str, **values: Any) -> None:
    """Set any of job_id, num_steps, step, archived_at."""
    db.table("runs").update(run_id, values)


def note(db: Database, run_id: str, **notes: Any) -> None:
    """Write notes into the detail of a run, in place of those of the same names."""
    with writing(db):
        detail = get(db, run_id).detail | notes
        db.table("runs").update(run_id, {"detail_json": json.dumps(detail, ensure_ascii=False)})


def remove(db: Database, run_id: str) -> None:
    """Forget a run and what was registered of it."""
    with writing(db):
        for table in ("checkpoints", "metrics", "samples", "run_events"):
            db.execute(f"delete from {table} where run_id = ?", [run_id])
        db.execute("delete from runs where id = ?", [run_id])


def next_id(db: Database, name: str) -> str:
    """`name-1`, `name-2`, …: the first that is free."""
    taken = {row["id"] for row in db.query("select id from runs")}
    return next(f"{name}-{n}" for n in range(1, len(taken) + 2) if f"{name}-{n}" not in taken)
