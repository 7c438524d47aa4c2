"""The row of a job: what an operating-system process is doing, asked for, and how it ended."""

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from studio.errors import JobError
from studio.store.records import new_id, now, select, to_row, writing

STARTUP_GRACE_SECONDS = 15
LIVE_STATES = ("queued", "running", "stopping")
LEFT_AT_ONCE = "asked to end a second time: it leaves at once, without saving"  # last words of a process in its log
ENDED_STATES = ("finished", "stopped", "failed", "lost")
MOVES = {
    "running": ("queued",),
    "stopping": ("queued", "running", "stopping"),
    "finished": ("running", "stopping"),
    "stopped": LIVE_STATES,
    "failed": LIVE_STATES,
    "lost": LIVE_STATES,
}


@dataclass
class Job:
    """One process. `current` of `total` in `unit` is its progress; `cause` says why it ended when not by itself.

    `place` orders the queue (lowest first); a job that is `held` lets others pass. `starts` counts the processes that
    it was given, a later one at `start_at`; `boot_id` and `oom_kills` are the machine's as that one began.
    """

    kind: str
    title: str = ""
    id: str = field(default_factory=new_id)
    state: str = "queued"
    phase: str = ""
    cause: str = ""
    run_id: str = ""
    needs_device: bool = True
    args: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    current: int = 0
    total: int = 0
    unit: str = ""
    created_at: str = field(default_factory=now)
    started_at: str = ""
    finished_at: str = ""
    heartbeat_at: str = ""
    pid: int = 0
    process_created: float = 0.0
    log_path: str = ""
    stop_request: str = ""
    save_request: int = 0
    sample_request: int = 0
    place: float = field(default_factory=time.time)
    held: int = 0
    starts: int = 1
    start_at: str = ""
    boot_id: str = ""
    oom_kills: int = 0

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def starting(self) -> bool:
        """Its row is there and its process is being started; one that never was counts for some seconds only."""
        age = datetime.now(UTC) - datetime.fromisoformat(self.start_at or self.created_at)
        return not self.pid and age.total_seconds() < STARTUP_GRACE_SECONDS

    @property
    def waiting(self) -> bool:
        """It has a turn to wait for, and has not begun."""
        return self.state == "queued" and self.needs_device

    @property
    def turn(self) -> tuple[bool, float, str]:
        """What sorts the jobs that need the device: those that have it, then those that wait in their order."""
        return (self.waiting, self.place, self.id)


def add(db: Database, job: Job) -> Job:
    db.table("jobs").insert(to_row(job))
    return job


def get(db: Database, job_id: str) -> Job:
    """Raises JobError when there is none of that id."""
    found = select(db, Job, "select * from jobs where id = ?", [job_id])
    if not found:
        raise JobError(f"There is no job {job_id!r} in this project.", "`retune runs list` shows what there is.")
    return found[0]


def listed(db: Database, states: tuple[str, ...] = LIVE_STATES + ENDED_STATES, kind: str = "") -> list[Job]:
    """Jobs in the given states (all by default), newest first."""
    marks = ",".join("?" * len(states))
    sql = f"select * from jobs where state in ({marks}) and (? = '' or kind = ?) order by id desc"
    return select(db, Job, sql, [*states, kind, kind])


def move(db: Database, job_id: str, state: str, cause: str = "") -> None:
    """Change the state; JobError when the move is not one that a job can make (a finished job never runs again)."""
    times = {"running": "started_at"}.get(state, "finished_at" if state in ENDED_STATES else "")
    allowed = MOVES[state]
    with writing(db):
        row = db.execute("select state from jobs where id = ?", [job_id]).fetchone()
        if row is None or row[0] not in allowed:
            raise JobError(f"Job {job_id} is {row[0] if row else 'unknown'} and cannot become {state}.")
        values: dict[str, Any] = {"state": state, "heartbeat_at": now()}
        if times:
            values[times] = now()
        if cause:
            values["cause"] = cause
        db.table("jobs").update(job_id, values)


def beat(db: Database, job_id: str, **values: Any) -> None:
    """Note that the process lives, with any of phase, current, total, unit, pid, process_created."""
    db.table("jobs").update(job_id, {"heartbeat_at": now(), **values})


def begin_again(db: Database, job: Job) -> bool:
    """Give a queued job whose process is gone another one; False when somebody else did, or it is queued no more."""
    with writing(db):
        now_ = get(db, job.id)
        if now_.state != "queued" or now_.stop_request or (now_.pid, now_.starts) != (job.pid, job.starts):
            return False
        db.table("jobs").update(job.id, {"pid": 0, "starts": job.starts + 1, "start_at": now()})
    return True


def arrange(db: Database, job_id: str, **values: Any) -> None:
    """Set `place` or `held` of a job that waits. Raises JobError for one that does not."""
    with writing(db):
        job = get(db, job_id)
        if not job.waiting:
            raise JobError(f"Job {job_id} is {job.state}.", "Only a job that waits in line can be moved or held.")
        db.table("jobs").update(job_id, values)


def set_result(db: Database, job_id: str, result: dict[str, Any]) -> None:
    db.table("jobs").update(job_id, {"result_json": json.dumps(result, ensure_ascii=False)})


def request(db: Database, job_id: str, **flags: Any) -> None:
    """Ask a job for something at its next step border: save_request, sample_request, or stop_request.

    A stop_request is save or discard; kill says that its process is being ended.
    """
    db.table("jobs").update(job_id, flags)


def take_requests(db: Database, job_id: str) -> Job:
    """The job as it is now; save and sample requests are cleared, for the caller has them."""
    with writing(db):
        job = get(db, job_id)
        if job.save_request or job.sample_request:
            db.table("jobs").update(job_id, {"save_request": 0, "sample_request": 0})
    return job
