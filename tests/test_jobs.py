"""Jobs as real processes: their turn in line, how they are stopped, and that every end has a cause.

The work is `fetch` of a model that is there already: it ends at once, or waits for as long as the test holds its lock.
"""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from studio import jobs, processes
from studio.errors import JobError, StoreBusyError
from studio.models import write_manifest
from studio.paths import REPOSITORY
from studio.projects import Project, create_project
from studio.store import jobs as store
from studio.store import open_db
from studio.store.jobs import Job

PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder in which `starter` counts as fetched."""
    root = tmp_path / "models"
    (root / "starter").mkdir(parents=True)
    (root / "starter" / "config.json").write_text("{}")
    write_manifest(root / "starter", "starter", "starter", "a test")
    monkeypatch.setenv("RETUNE_MODELS", str(root))
    return root


@pytest.fixture(autouse=True)
def no_process_is_left(own_home: Path) -> Iterator[None]:
    yield
    for folder, job in jobs.live_jobs():
        jobs.kill(folder, job.id)


@contextmanager
def work_that_takes_long(models: Path) -> Iterator[None]:
    (models / ".locks").mkdir(exist_ok=True)
    with FileLock(models / ".locks" / "starter.lock"):
        yield


def fetch(project: Project, base: str = "starter", needs_device: bool = True) -> Job:
    return jobs.start(project.folder, "fetch", {"base": base}, needs_device=needs_device)


def until(project: Project, job: Job, wanted: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        current = jobs.get(project.folder, job.id)
        if wanted(current):
            return current
        time.sleep(0.05)
    raise AssertionError(f"{current} in {PATIENCE_SECONDS} s; log:\n{jobs.tail(Path(current.log_path))}")


def ended(project: Project, job: Job) -> Job:
    return until(project, job, lambda job: not job.live)


def at_work(project: Project, job: Job) -> Job:
    return until(project, job, lambda job: job.state == "running" and "Waiting" in job.phase)


def test_a_job_ends_with_its_result_and_a_log(project: Project, models: Path) -> None:
    done = ended(project, fetch(project))
    assert done.state == "finished" and done.cause == ""
    assert done.result == {"base": "starter", "folder": str(models / "starter")}
    assert done.created_at <= done.started_at <= done.finished_at
    assert "finished" in jobs.tail(Path(done.log_path))


@pytest.mark.parametrize(
    ("base", "cause"), [("", "does not name"), ("../x", "goes up"), ("/nowhere", "no such folder")]
)
def test_a_job_that_cannot_do_its_work_fails_with_the_next_move(project: Project, base: str, cause: str) -> None:
    done = ended(project, fetch(project, base))
    assert done.state == "failed" and cause in done.cause
    assert "Allowed" in done.cause or "Give a folder" in done.cause


def test_a_fault_of_our_own_is_named_and_the_log_has_the_trace(project: Project) -> None:
    done = ended(project, jobs.start(project.folder, "fetch", {}))
    assert done.state == "failed" and "KeyError: 'base'" in done.cause and "log" in done.cause
    assert "Traceback" in jobs.tail(Path(done.log_path))


def test_a_process_that_never_became_a_job_is_lost(project: Project) -> None:
    done = ended(project, jobs.start(project.folder, "no-such-verb", {}))
    assert done.state == "lost" and "exit code 1" in done.cause
    assert "usage" in jobs.tail(Path(done.log_path))


def test_a_killed_process_is_lost_with_a_cause(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        os.kill(job.pid, signal.SIGKILL)
        done = ended(project, job)
    assert done.state == "lost" and "signal 9" in done.cause and "memory" in done.cause
    with pytest.raises(JobError, match="lost and cannot become"), open_db(project.folder) as db:
        store.move(db, job.id, "running")


def test_the_second_waits_in_line_and_then_runs(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        first = at_work(project, fetch(project))
        second = fetch(create_project("Other"))
        other = create_project("Third")
        third = fetch(other)
        second_project = next(folder for folder, job in jobs.live_jobs() if job.id == second.id)
        waiting = until(other, third, lambda job: job.phase == "waiting in line")
        assert waiting.state == "queued" and jobs.get(second_project, second.id).state == "queued"
        assert [job.id for _, job in jobs.live_jobs()] == [first.id, second.id, third.id]
    last = ended(other, third)
    ends = [jobs.get(project.folder, first.id), jobs.get(second_project, second.id), last]
    assert [job.state for job in ends] == ["finished"] * 3
    assert ends[0].finished_at <= ends[1].started_at and ends[1].finished_at <= ends[2].started_at


def test_who_needs_no_device_does_not_wait(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        at_work(project, fetch(project))
        done = ended(project, fetch(project, "/nowhere", needs_device=False))
    assert done.state == "failed"


def test_a_dead_job_in_front_holds_nobody_up(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        first = at_work(project, fetch(project))
        second = fetch(project)
        until(project, second, lambda job: job.phase == "waiting in line")
        os.kill(first.pid, signal.SIGKILL)
    assert ended(project, second).state == "finished"


def test_stopping_one_that_waits_leaves_the_one_at_work(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        first = at_work(project, fetch(project))
        second = fetch(project)
        until(project, second, lambda job: job.phase == "waiting in line")
        jobs.stop(project.folder, second.id)
        done = ended(project, second)
        assert (done.state, done.cause) == ("stopped", "Stopped on request.")
        assert jobs.get(project.folder, first.id).state == "running"
    assert ended(project, first).state == "finished"


def test_one_at_work_stops_when_asked(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        jobs.stop(project.folder, job.id)
        jobs.stop(project.folder, job.id, save=False)
        assert jobs.get(project.folder, job.id).state in ("stopping", "stopped")
        assert ended(project, job).state == "stopped"
    jobs.stop(project.folder, job.id)  # asking again does no harm
    jobs.kill(project.folder, job.id)
    assert jobs.get(project.folder, job.id).state == "stopped"


def test_a_polite_signal_is_a_request_to_stop(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        os.kill(job.pid, signal.SIGTERM)
        done = ended(project, job)
        assert (done.state, done.cause) == ("stopped", "Stopped: the system asked its process to end.")


def test_a_second_signal_ends_it_at_once_and_is_named(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        os.kill(job.pid, signal.SIGSTOP)
        os.kill(job.pid, signal.SIGTERM), os.kill(job.pid, signal.SIGINT), os.kill(job.pid, signal.SIGCONT)
        done = ended(project, job)
    assert done.state == "lost" and "asked to end a second time" in done.cause
    assert "it leaves at once, without saving" in jobs.tail(Path(done.log_path))


def test_the_system_may_end_what_waits_and_it_keeps_its_place(project: Project, models: Path) -> None:
    """As when a machine is shut down: every process is asked to end."""
    with work_that_takes_long(models):
        at_work(project, fetch(project))
        second = waits(project, fetch(project))
        os.kill(second.pid, signal.SIGTERM)
        again = until(project, second, lambda job: job.pid not in (0, second.pid))
        assert (again.state, again.starts) == ("queued", 2)
    assert ended(project, second).state == "finished"
    assert "keeps its place" in jobs.tail(Path(second.log_path))


def test_killing_ends_the_process(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        jobs.kill(project.folder, job.id)
        done = jobs.get(project.folder, job.id)
    assert done.state == "stopped" and "Killed on request" in done.cause
    assert not processes.lives(job.pid, job.process_created)


def test_killing_needs_no_space(project: Project, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk nothing can be stored: neither that it was asked for, nor the end."""
    full = sqlite3.OperationalError("database or disk is full")
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        with monkeypatch.context() as patches:
            for name in ("request", "move"):
                patches.setattr(store, name, raising(full))
            jobs.kill(project.folder, job.id)
            assert not processes.lives(job.pid, job.process_created)
            assert [each.state for each in jobs.refresh(project.folder)] == ["running"]  # it cannot be told yet
            assert jobs.get(project.folder, job.id).state == "running"
        assert jobs.get(project.folder, job.id).state == "lost"


def test_stopping_needs_no_space(project: Project, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the process is told: this one leaves the line."""
    full = sqlite3.OperationalError("database or disk is full")
    with work_that_takes_long(models):
        first = at_work(project, fetch(project))
        second = waits(project, fetch(project))
        with monkeypatch.context() as patches:
            patches.setattr(store, "request", raising(full))
            for _ in range(2):  # asked twice is asked once
                jobs.stop(project.folder, second.id)
            done = ended(project, second)
            assert (done.state, done.stop_request) == ("stopped", "")
            patches.setattr(processes, "_handles", lambda pid, number: False)
            with pytest.raises(StoreBusyError):  # a signal would end it: it just begins, or is of an older version
                jobs.stop(project.folder, first.id)
    assert ended(project, first).state == "finished"


def raising(error: Exception) -> Callable[..., None]:
    def call(*args: object, **values: object) -> None:
        raise error

    return call


def test_jobs_that_cannot_be_looked_at_just_now_are_not_passed_over(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        for name in ("get", "listed"):
            patches.setattr(store, name, raising(sqlite3.OperationalError("disk I/O error")))
        for look in (jobs.live_jobs, jobs.waiting, lambda: jobs.find("x")):
            with pytest.raises(StoreBusyError, match="disk I/O error"):
                look()


def dead_job(project: Project) -> Job:
    """A row that says it runs, of a process that is gone."""
    with open_db(project.folder) as db:
        return store.add(db, Job("train", state="running", pid=os.getpid(), process_created=1.0))


def test_two_watchers_may_find_the_same_job_dead(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_job(project)
    how = jobs._how_it_died

    def another_is_faster(job: Job) -> str:
        monkeypatch.setattr(jobs, "_how_it_died", how)
        assert jobs.get(project.folder, job.id).state == "lost"
        return how(job)

    monkeypatch.setattr(jobs, "_how_it_died", another_is_faster)
    assert jobs.refresh(project.folder)[0].state == "lost"


def test_who_sees_a_killed_job_dead_first_says_that_it_was_killed(
    project: Project, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_tree = jobs._kill_tree

    def kill_and_be_seen(job: Job) -> None:
        kill_tree(job)
        assert jobs.get(project.folder, job.id).state == "stopped"

    monkeypatch.setattr(jobs, "_kill_tree", kill_and_be_seen)
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        jobs.kill(project.folder, job.id)
    done = jobs.get(project.folder, job.id)
    assert (done.state, done.cause) == ("stopped", jobs.KILLED)


def test_a_process_that_cannot_be_started_is_a_failed_job(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **more: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(OSError, match="temporarily unavailable"):
        fetch(project)
    (job,) = jobs.refresh(project.folder)
    assert job.state == "failed" and "temporarily unavailable" in job.cause


def test_a_row_without_a_process_does_not_hold_up_the_line_for_ever(project: Project) -> None:
    long_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat(timespec="microseconds")
    with open_db(project.folder) as db:
        store.add(db, Job("train", created_at=long_ago))
    assert ended(project, fetch(project)).state == "finished"


def test_a_job_outlives_who_started_it_and_is_found_again(project: Project, models: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from studio import jobs;"
        "print(jobs.start(Path(sys.argv[1]), 'fetch', {'base': 'starter'}).id)"
    )
    with work_that_takes_long(models):
        started = subprocess.run(
            [sys.executable, "-c", code, str(project.folder)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=60,
        )
        job = jobs.get(project.folder, started.stdout.strip())
        job = at_work(project, job)
        assert jobs.alive(job) and psutil.Process(job.pid).ppid() != os.getpid()
        os.kill(job.pid, signal.SIGKILL)
        done = ended(project, job)
    assert done.state == "lost" and "is gone" in done.cause


def test_the_heartbeat_goes_on_while_the_work_takes_long(project: Project, models: Path) -> None:
    with work_that_takes_long(models):
        job = at_work(project, fetch(project))
        until(project, job, lambda now: now.heartbeat_at > job.heartbeat_at)


def test_a_process_id_given_to_another_is_not_the_job(project: Project) -> None:
    with open_db(project.folder) as db:
        job = store.add(db, Job("train", state="running", pid=os.getpid(), process_created=1.0))
    assert jobs.get(project.folder, job.id).state == "lost"


def test_a_row_without_a_process_is_given_time_to_start(project: Project) -> None:
    long_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat(timespec="microseconds")
    with open_db(project.folder) as db:
        young = store.add(db, Job("train"))
        old = store.add(db, Job("train", created_at=long_ago))
    states = {job.id: job.state for job in jobs.refresh(project.folder)}
    assert states == {young.id: "queued", old.id: "lost"}


def test_watching_ends_with_the_job(project: Project) -> None:
    seen = list(jobs.watch(project.folder, fetch(project).id, interval_seconds=0.05))
    assert seen[-1].state == "finished" and all(job.live for job in seen[:-1])


def test_a_job_can_be_asked_for_two_things_only(project: Project) -> None:
    with pytest.raises(JobError, match="save, sample"):
        jobs.request(project.folder, "x", "coffee")
    with pytest.raises(JobError, match="no job 'x'"):
        jobs.get(project.folder, "x")


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert jobs.tail(log) == ""
    log.write_bytes(b"first\n" + b"x" * 400_000 + b"\n10%\r20%\r30%\nlast \xff\n")
    assert jobs.tail(log, num_lines=3).splitlines() == ["20%", "30%", "last \ufffd"]
    assert len(jobs.tail(log)) < 260_000


def test_a_damaged_project_neither_hides_nor_holds_up_the_jobs_of_others(models: Path) -> None:
    broken, sound = create_project("broken"), create_project("sound")
    (broken.folder / "studio.db").write_bytes(b"not a database" * 100)
    with work_that_takes_long(models):
        job = fetch(sound)
        assert [(folder.name, live.id) for folder, live in jobs.live_jobs()] == [("sound", job.id)]
    last = list(jobs.watch(sound.folder, job.id))[-1]
    assert last.state == "finished", last.cause


def waits(project: Project, job: Job) -> Job:
    return until(project, job, lambda now: now.phase == "waiting in line")


def test_the_queue_is_reordered_held_and_survives_a_kill(project: Project, models: Path) -> None:
    """Of three that wait, one is moved to the front, one is held, one is killed while it waits, beside a project whose
    database is damaged."""
    broken, other = create_project("broken"), create_project("Other")
    (broken.folder / "studio.db").write_bytes(b"not a database" * 100)
    with work_that_takes_long(models):
        at_work(project, fetch(project))
        second, third, fourth = fetch(project), fetch(other), fetch(project)
        killed = waits(other, third)
        waits(project, second), waits(project, fourth)
        jobs.move(project.folder, fourth.id, "first")
        jobs.hold(project.folder, second.id)
        assert [job.id for _, job in jobs.waiting()] == [fourth.id, second.id, third.id]
        jobs.move(other.folder, third.id, "up")
        assert [job.id for _, job in jobs.waiting()] == [fourth.id, third.id, second.id]
        until(project, second, lambda job: job.phase.startswith("held"))
        os.kill(killed.pid, signal.SIGKILL)
        again = until(other, third, lambda job: job.pid not in (0, killed.pid) and job.starts == 2)
        assert again.state == "queued"
    last = ended(other, third)
    first = jobs.get(project.folder, fourth.id)
    assert [first.state, last.state] == ["finished", "finished"] and first.finished_at <= last.started_at
    assert jobs.get(project.folder, second.id).state == "queued"
    jobs.hold(project.folder, second.id, held=False)
    assert ended(project, second).state == "finished"
    with pytest.raises(JobError, match="does not wait"):
        jobs.move(project.folder, second.id, "first")
    with pytest.raises(JobError, match="Only a job that waits"):
        jobs.hold(project.folder, second.id)


def waiting_row(project: Project, **values: object) -> Job:
    """A job that waits, whose process is gone."""
    job = Job("fetch", pid=os.getpid(), process_created=1.0, **values)  # type: ignore[arg-type]
    with open_db(project.folder) as db:
        return store.add(db, job)


def test_a_job_whose_process_dies_again_and_again_while_it_waits_is_lost(project: Project) -> None:
    job = waiting_row(project, starts=jobs.MOST_STARTS, boot_id=processes.boot_id())
    written_for(project, job)
    assert jobs.get(project.folder, job.id).state == "lost"


def written_for(project: Project, job: Job) -> None:
    folder = project.path("jobs", job.id)
    folder.mkdir(parents=True)
    (folder / jobs.JOB_FILE).write_text("{}")


def test_a_machine_that_is_restarted_again_and_again_does_not_empty_the_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(jobs, "_start_process", lambda db, job, job_dir: started.append(job.id))
    job = waiting_row(project, starts=jobs.MOST_STARTS, boot_id="another")
    written_for(project, job)
    assert jobs.get(project.folder, job.id).state == "queued" and started == [job.id]


def test_a_job_that_waited_and_was_to_stop_is_stopped_though_its_process_is_gone(project: Project) -> None:
    job = waiting_row(project, stop_request="save", state="stopping")
    done = jobs.get(project.folder, job.id)
    assert (done.state, done.cause) == ("stopped", "Stopped on request; it had not begun.")


def test_two_watchers_give_a_job_one_process(project: Project) -> None:
    job = waiting_row(project)
    with open_db(project.folder) as db:
        assert [store.begin_again(db, job), store.begin_again(db, job)] == [True, False]
        assert store.get(db, job.id).starts == 2


def test_places_between_others() -> None:
    assert jobs._place_between([], 0) > 0
    assert [jobs._place_between([1.0, 2.0], at) for at in (0, 1, 2)] == [0.0, 1.5, 3.0]


def test_an_ended_job_is_tried_again(project: Project, models: Path) -> None:
    failed = ended(project, fetch(project, "/nowhere"))
    again = jobs.start_again(project.folder, failed.id)
    assert again.id != failed.id and again.args == failed.args
    assert jobs.find(again.id) == project.folder
    assert ended(project, again).state == "failed"
    with pytest.raises(JobError, match="no job 'x' on this machine"):
        jobs.find("x")


def test_a_restart_of_the_machine_is_named(project: Project) -> None:
    with open_db(project.folder) as db:
        job = store.add(db, Job("train", state="running", pid=os.getpid(), process_created=1.0, boot_id="another"))
    assert "restarted, or lost power" in jobs.get(project.folder, job.id).cause


@pytest.mark.parametrize(("says", "kills"), [(True, 0), (False, 1)])
def test_the_kernels_word_that_memory_ran_out_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch, says: bool, kills: int
) -> None:
    monkeypatch.setattr(processes, "kernel_says_oom", lambda pid: says)
    monkeypatch.setattr(processes, "oom_kills", lambda: 3 + kills)
    running = {"state": "running", "pid": os.getpid(), "process_created": 1.0}
    with open_db(project.folder) as db:
        job = store.add(db, Job("train", boot_id=processes.boot_id(), oom_kills=3, **running))  # type: ignore[arg-type]
    assert "memory ran out; try a smaller micro_batch_size" in jobs.get(project.folder, job.id).cause


@pytest.mark.parametrize(
    ("own", "file", "text", "kills"),
    [
        ("0::/user/job\n", "user/job/memory.events", "oom 4\noom_kill 3\noom_group_kill 0\n", 3),
        ("0::/elsewhere\n", "memory.events", "oom_kill 3\n", 3),
        ("4:memory:/job\n2:cpu:/\n0::/\n", "memory/job/memory.oom_control", "under_oom 0\noom_kill 3\n", 3),
        ("4:memory:/docker/abc\n", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 3\n", 3),
        ("4:memory:/job\n", "memory/job/memory.events", "oom_kill 3\n", 0),  # a file of the other version
    ],
)
def test_the_kernels_count_is_found_in_both_versions_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, file: str, text: str, kills: int
) -> None:
    groups = tmp_path / "groups"
    (groups / file).parent.mkdir(parents=True)
    (groups / file).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(processes, "GROUPS", groups)
    monkeypatch.setattr(processes, "OWN_GROUPS", tmp_path / "own")
    assert processes.oom_kills() == kills
    monkeypatch.setattr(processes, "OWN_GROUPS", tmp_path / "none")
    assert processes.oom_kills() == 0


def test_what_the_kernel_tells_can_be_asked() -> None:
    assert processes.boot_id() == processes.boot_id() != ""
    assert processes.oom_kills() >= 0 and processes.kernel_says_oom(2**30) is False
