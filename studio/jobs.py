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
from studio.errors import JobError, StoreBusyError, StoreError
from studio.paths import REPOSITORY, atomic_write_json, job_folders
from studio.store import jobs as store
from studio.store import open_db
from studio.store.jobs import LEFT_AT_ONCE, Job

JOB_FILE = "job.json"
REAP_SECONDS = 5
MOST_STARTS = 3  # of a job that is killed again and again while it waits; a restart of the machine does not count
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
    job.log_path = str(log_path or job_dir / "job.log")
    atomic_write_json(job_dir / JOB_FILE, {"id": job.id, "kind": kind, "folder": str(folder), "args": args})
    with open_db(folder) as db:
        store.add(db, job)
        _start_process(db, job, job_dir)
    return job


def _start_process(db: Any, job: Job, job_dir: Path) -> None:
    try:
        process = _spawn(job.kind, job_dir, Path(job.log_path))
    except OSError as error:
        store.move(db, job.id, "failed", f"Its process could not be started: {error}.")
        raise
    store.beat(
        db, job.id, pid=process.pid, process_created=processes.created(process.pid),
        boot_id=processes.boot_id(), oom_kills=processes.oom_kills(),
    )  # fmt: skip


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
    with contextlib.suppress(StoreBusyError), open_db(folder) as db:
        _look_after(db, folder, store.get(db, job_id))
    with open_db(folder) as db:
        return store.get(db, job_id)


def refresh(folder: Path) -> list[Job]:
    """All jobs of a project, newest first, those whose process is gone marked lost."""
    with open_db(folder) as db:
        gone = [job for job in store.listed(db, store.LIVE_STATES) if not (alive(job) or job.starting)]
    for job in gone:
        with contextlib.suppress(StoreBusyError), open_db(folder) as db:  # an end that cannot be stored now is later
            _look_after(db, folder, job)
    with open_db(folder) as db:
        return store.listed(db)


def live_jobs() -> list[tuple[Path, Job]]:
    """Jobs that are queued or running on this machine, in all projects: those at work, then those in line.

    A project whose database is damaged is passed over: it says so where it is opened, and must not hide the others.
    """
    return sorted(((folder, job) for folder, job in all_jobs() if job.live), key=lambda pair: pair[1].turn)


def all_jobs() -> list[tuple[Path, Job]]:
    """Jobs of all projects, oldest first, ended ones too; those of a damaged database are passed over.

    Raises StoreBusyError while one cannot be read just now, as on a full disk: jobs in it may be at work.
    """
    found: list[tuple[Path, Job]] = []
    for folder in job_folders():
        try:
            found += [(folder, job) for job in refresh(folder)]
        except StoreBusyError:
            raise
        except StoreError:
            continue
    return sorted(found, key=lambda pair: pair[1].id)


def waiting() -> list[tuple[Path, Job]]:
    """The queue: jobs of all projects that wait for the device, the next one first."""
    return [(folder, job) for folder, job in live_jobs() if job.waiting]


def find(job_id: str) -> Path:
    """The folder of a job of any project. Raises JobError without one of that id, StoreBusyError as `all_jobs`."""
    for folder in job_folders():
        try:
            with open_db(folder) as db:
                store.get(db, job_id)
            return folder
        except StoreBusyError:
            raise
        except (StoreError, JobError):
            continue
    raise JobError(f"There is no job {job_id!r} on this machine.", "`retune jobs list --all` shows those there are.")


def hold(folder: Path, job_id: str, held: bool = True) -> None:
    """Let a job that waits in line be passed by others until it is released. Raises JobError for one at work."""
    with open_db(folder) as db:
        store.arrange(db, job_id, held=int(held))


def move(folder: Path, job_id: str, where: str) -> None:
    """Move a job that waits in line "up" or "down" by one, or to the "first" or "last" place. Raises JobError."""
    line = [job for _folder, job in waiting()]
    at = next((index for index, job in enumerate(line) if job.id == job_id), None)
    if at is None:
        raise JobError(f"Job {job_id} does not wait in line.", "`retune jobs list` shows the queue.")
    to = {"up": at - 1, "down": at + 1, "first": 0, "last": len(line) - 1}.get(where)
    if to is None:
        raise JobError(f"A job cannot be moved {where!r}.", "Allowed: up, down, first, last.")
    others = [job.place for job in line if job.id != job_id]
    with open_db(folder) as db:
        store.arrange(db, job_id, place=_place_between(others, max(0, min(to, len(others)))))


def _place_between(places: list[float], index: int) -> float:
    """A place that comes at `index` among others: one row is written, so a kill leaves the old order or the new."""
    if not places:
        return time.time()
    if index == 0:
        return places[0] - 1
    if index == len(places):
        return places[-1] + 1
    return (places[index - 1] + places[index]) / 2


def start_again(folder: Path, job_id: str) -> Job:
    """A new job that does what an ended one was to do. Raises JobError for one that is live.

    A training is resumed instead: `studio.runs.retry` knows how.
    """
    old = get(folder, job_id)
    if old.live:
        raise JobError(f"Job {job_id} is {old.state}.", "Only a job that has ended can be tried again.")
    return start(folder, old.kind, old.args, title=old.title, run_id=old.run_id, needs_device=old.needs_device)


def stop(folder: Path, job_id: str, save: bool = True) -> None:
    """Ask a job to stop at its next step border, with or without saving. One that still waits in line stops at once.

    While that cannot be stored (a full disk) its process is told. Raises StoreBusyError where that cannot be, either.
    """
    with open_db(folder) as db:
        job = store.get(db, job_id)
    if not job.live:
        return
    how = "save" if save else "discard"
    try:
        with open_db(folder) as db:
            store.request(db, job_id, stop_request=how)
            store.move(db, job_id, "stopping")
    except StoreBusyError:
        if not (alive(job) and processes.ask_to_stop(job.pid, job.process_created, how)):
            raise


def kill(folder: Path, job_id: str) -> None:
    """End a job's process and all it started, at once. What was saved before stays."""
    with open_db(folder) as db:
        job = store.get(db, job_id)
    if not job.live:
        return
    with contextlib.suppress(StoreBusyError), open_db(folder) as db:  # a full disk keeps nobody from killing
        store.request(db, job_id, stop_request="kill")  # first, for others may see it dead before this one does
    _kill_tree(job)
    with contextlib.suppress(StoreBusyError), open_db(folder) as db:
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


def _look_after(db: Any, folder: Path, job: Job) -> None:
    """A live job whose process is gone has its end named; one that only waited gets another process."""
    if not job.live or alive(job) or job.starting:
        return
    job = store.get(db, job.id)  # as it is now: it may have ended by itself between the two looks
    if not job.live:
        return
    if job.stop_request and job.state in ("queued", "stopping") and not job.started_at:
        _end(db, job, "stopped", "Stopped on request; it had not begun.")
    elif not _begin_again(db, folder, job):
        _end_dead(db, store.get(db, job.id))


def _begin_again(db: Any, folder: Path, job: Job) -> bool:
    """Whether a job that was killed while it waited has a process again (or somebody else gave it one)."""
    job_dir = folder / "jobs" / job.id
    died_by_itself = (_exit_code(job.pid) or 0) > 0
    worn_out = job.starts >= MOST_STARTS and job.boot_id == processes.boot_id()
    if job.state != "queued" or worn_out or died_by_itself or not (job_dir / JOB_FILE).is_file():
        return False
    if store.begin_again(db, job):
        _start_process(db, job, job_dir)
    return True


def _end_dead(db: Any, job: Job) -> None:
    """Name the end of a job whose process is gone, unless it has one."""
    if not job.live:
        return
    if job.stop_request == "kill":
        _end(db, job, "stopped", KILLED)
    else:
        _end(db, job, "lost", _how_it_died(job))


def _end(db: Any, job: Job, state: str, cause: str) -> None:
    with contextlib.suppress(JobError):  # another watcher, or its own last words, came first
        store.move(db, job.id, state, cause)


def _how_it_died(job: Job) -> str:
    code = _exit_code(job.pid)
    if job.boot_id and job.boot_id != processes.boot_id():
        how = "is gone: the machine was restarted, or lost power, while it ran"
    elif job.log_path and tail(Path(job.log_path), 1) == LEFT_AT_ONCE:
        how = "left at once when it was asked to end a second time, without saving"
    elif _out_of_memory(job, code):
        how = processes.OUT_OF_MEMORY
    elif code == -signal.SIGKILL:
        how = processes.KILLED
    elif code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    elif code is not None:
        how = f"ended with exit code {code}"
    else:
        how = processes.GONE
    end = "a training run can be resumed from its last checkpoint, if it saved one."
    return f"The process {how}. Its log says more; {end}"


def _out_of_memory(job: Job, code: int | None) -> bool:
    """Whether it was killed, as far as is known, and the kernel says that it did that."""
    if code not in (None, -signal.SIGKILL):
        return False
    return processes.out_of_memory(job.pid, job.oom_kills) if job.boot_id else processes.kernel_says_oom(job.pid)


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
