"""The only door to the engine: start a process for a job, watch it, ask it to stop, name how it ended.

A job outlives the app. It is found again by its row: process id and creation time together name one process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from studio import processes
from studio.errors import JobError, StoreError
from studio.paths import REPOSITORY, atomic_write_json, job_folders
from studio.store import jobs as store
from studio.store import open_db
from studio.store.jobs import Job

JOB_FILE = "job.json"
REAP_SECONDS = 5
KILLED = "Killed on request; resume starts from its last checkpoint."
# Children of this process are zombies until they are waited for; keep the handles to do so.
_children: dict[int, subprocess.Popen[bytes]] = {}


def start(
    folder: Path,
    kind: str,
    args: dict[str, Any],
    *,
    title: str = "",
    run_id: str = "",
    log_path: Path | None = None,
    needs_device: bool = True,
) -> Job:
    """Start `python -m studio.engine KIND JOB_DIR` in a session of its own and return its row.

    `folder` is a project's (or `system_folder()`); `args` must be JSON and hold no secret. A job that `needs_device`
    waits in line behind older ones of all projects.
    """
    job = Job(kind=kind, title=title or kind, run_id=run_id, args=args, needs_device=needs_device)
    job_dir = folder / "jobs" / job.id
    job_dir.mkdir(parents=True)
    log = log_path or job_dir / "job.log"
    job.log_path = str(log)
    atomic_write_json(job_dir / JOB_FILE, {"id": job.id, "kind": kind, "folder": str(folder), "args": args})
    with open_db(folder) as db:
        store.add(db, job)
        try:
            process = _spawn(kind, job_dir, log)
        except OSError as error:
            store.move(db, job.id, "failed", f"Its process could not be started: {error}.")
            raise
        store.beat(db, job.id, pid=process.pid, process_created=processes.created(process.pid))
    return job


def _spawn(kind: str, job_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "studio.engine", kind, str(job_dir)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    _children[process.pid] = process
    return process


def get(folder: Path, job_id: str) -> Job:
    """The job as it is now: one whose process is gone is marked lost first."""
    with open_db(folder) as db:
        job = store.get(db, job_id)
        _mark_if_lost(db, job)
        return store.get(db, job_id)


def refresh(folder: Path) -> list[Job]:
    """All jobs of a project, newest first, those whose process is gone marked lost."""
    with open_db(folder) as db:
        for job in store.listed(db, store.LIVE_STATES):
            _mark_if_lost(db, job)
        return store.listed(db)


def live_jobs() -> list[tuple[Path, Job]]:
    """Jobs that are queued or running on this machine, in all projects, oldest first.

    A project whose database is damaged is passed over: it says so where it is opened, and must not hide the others.
    """
    found: list[tuple[Path, Job]] = []
    for folder in job_folders():
        with contextlib.suppress(StoreError):
            found += [(folder, job) for job in refresh(folder) if job.live]
    return sorted(found, key=lambda pair: pair[1].id)


def stop(folder: Path, job_id: str, save: bool = True) -> None:
    """Ask a job to stop at its next step border, with or without saving. One that still waits in line stops at once."""
    with open_db(folder) as db:
        job = store.get(db, job_id)
        if not job.live:
            return
        store.request(db, job_id, stop_request="save" if save else "discard")
        store.move(db, job_id, "stopping")


def kill(folder: Path, job_id: str) -> None:
    """End a job's process and all it started, at once. What was saved before stays."""
    with open_db(folder) as db:
        job = store.get(db, job_id)
        if not job.live:
            return
        store.request(db, job_id, stop_request="kill")  # first, for others may see it dead before this one does
        _kill_tree(job)
        _end_dead(db, store.get(db, job_id))


def request(folder: Path, job_id: str, what: str) -> None:
    """Ask for "save" or "sample" at the next step border."""
    if what not in ("save", "sample"):
        raise JobError(f"A job cannot be asked for {what!r}.", "It can be asked for: save, sample.")
    with open_db(folder) as db:
        store.request(db, job_id, **{f"{what}_request": 1})


def watch(folder: Path, job_id: str, interval_seconds: float = 0.5) -> Iterator[Job]:
    """The job again and again until it has ended; the last one has an ended state."""
    while True:
        job = get(folder, job_id)
        yield job
        if not job.live:
            return
        time.sleep(interval_seconds)


def tail(path: Path, num_lines: int = 200, max_bytes: int = 256_000) -> str:
    """The end of a log. Progress bars' carriage returns count as line ends."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.replace("\r", "\n").splitlines()[-num_lines:])


def alive(job: Job) -> bool:
    """Whether the very process of this job still runs (a process id alone may have been given to another)."""
    if not job.pid:
        return False
    child = _children.get(job.pid)
    if child is not None and child.poll() is not None:
        return False
    return processes.lives(job.pid, job.process_created)


def _mark_if_lost(db: Any, job: Job) -> None:
    if not job.live or alive(job):
        return
    if not job.starting:
        _end_dead(db, store.get(db, job.id))  # as it is now: it may have ended by itself between the two looks


def _end_dead(db: Any, job: Job) -> None:
    """Name the end of a job whose process is gone, unless it has one."""
    if not job.live:
        return
    state, cause = ("stopped", KILLED) if job.stop_request == "kill" else ("lost", _how_it_died(job))
    with contextlib.suppress(JobError):  # another watcher, or its own last words, came first
        store.move(db, job.id, state, cause)


def _how_it_died(job: Job) -> str:
    code = _exit_code(job.pid)
    if code == -signal.SIGKILL:
        how = "was killed (signal 9): by a person, or by the system because memory ran out"
    elif code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    elif code is not None:
        how = f"ended with exit code {code}"
    else:
        how = "is gone: it was killed, memory ran out, or the machine restarted"
    return f"The process {how}. Its log says more; a training run can be resumed from its last checkpoint."


def _exit_code(pid: int) -> int | None:
    """Exit code of a process that this one started and that is ending; None when it is not ours to know."""
    child = _children.get(pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        # A killed process shows as a zombie while its last threads end; only then can it be waited for.
        return child.wait(REAP_SECONDS) if child else None
    return None


def _kill_tree(job: Job) -> None:
    if not alive(job):
        return
    process = psutil.Process(job.pid)
    doomed = [*process.children(recursive=True), process]
    for one in doomed:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(doomed, timeout=5)
