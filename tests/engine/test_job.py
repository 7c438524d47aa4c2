"""A job's own side: its end is told, even when the database cannot be written for a while, or at all."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from studio import jobs as watchers
from studio import machine, processes
from studio.engine import job as module
from studio.engine.device_lock import DeviceLock
from studio.engine.job import JobContext
from studio.errors import StoreBusyError, StoreError
from studio.paths import locks_folder
from studio.projects import Project, create_project
from studio.store import jobs, open_db
from studio.store.jobs import Job


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def context(project: Project) -> JobContext:
    with open_db(project.folder) as db:
        row = jobs.add(db, Job("train", state="running"))
    job_dir = project.path("jobs", row.id)
    job_dir.mkdir(parents=True)
    return JobContext(project.folder, row, job_dir)


def locked_for(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database cannot be opened so many times, by moves and results; progress does not count."""
    real, left = jobs.move, [times]

    def move(*args: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise StoreError("The database cannot be used: database is locked.", "Try again.")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "move", move)
    monkeypatch.setattr(module, "END_RETRY_SECONDS", (0.01, 0.01))


def finish(job: JobContext) -> None:
    job.finish({"steps": 3})


def fail(job: JobContext) -> None:
    raise StoreError("The disk is full.")


@pytest.mark.parametrize(("do", "state", "code"), [(finish, "finished", 0), (fail, "failed", 1)])
def test_a_database_that_is_locked_for_a_moment(
    context: JobContext,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    do: Callable[[JobContext], None],
    state: str,
    code: int,
) -> None:
    locked_for(2, monkeypatch)
    with context as job:
        do(job)
    assert context.exit_code == code
    with open_db(project.folder) as db:
        assert jobs.get(db, context.id).state == state


def test_an_end_that_cannot_be_stored_is_in_the_log_and_in_the_exit_code(
    context: JobContext, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    locked_for(9, monkeypatch)
    with context:
        raise ValueError("the cause of it all")
    assert context.exit_code == 1
    out, err = capsys.readouterr()
    assert "failed. ValueError: the cause of it all" in out
    assert err.count("not stored: The database cannot be used") == 3


def test_a_kill_that_is_on_its_way_begins_nothing(context: JobContext, project: Project) -> None:
    with open_db(project.folder) as db:
        jobs.request(db, context.id, stop_request="kill")
    assert context.requests().stop_request == "discard"
    watchers.kill(project.folder, context.id)
    with open_db(project.folder) as db:
        assert jobs.get(db, context.id).state == "stopped"


def test_a_job_whose_turn_comes_while_the_disk_is_full_waits(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_db(project.folder) as db:
        row = jobs.add(db, Job("train"))
    real, refusals = jobs.move, iter(range(2))

    def move(*args: object) -> None:
        if next(refusals, None) is not None:
            raise StoreBusyError("The database cannot be used: database or disk is full.", "Free some space.")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "move", move)
    monkeypatch.setattr(module, "BUSY_RETRY_SECONDS", 0.01)
    with JobContext(project.folder, row, project.path("jobs")) as job:
        job.wait_for_turn()
        job.finish({})
    with open_db(project.folder) as db:
        assert jobs.get(db, row.id).state == "finished"
    assert capsys.readouterr().err.count("its turn has come, and it waits") == 2


def test_without_saving_is_the_last_word_though_the_row_says_otherwise(context: JobContext) -> None:
    """Saving waits for space on a full disk, where no row can be changed."""
    with context as job:
        with open_db(job.folder) as db:
            jobs.request(db, job.id, stop_request="save")
        assert job.requests().stop_request == "save"
        os.kill(os.getpid(), processes.STOP_SIGNALS["save"])
        assert job.requests().stop_request == "save"
        os.kill(os.getpid(), processes.STOP_SIGNALS["discard"])
        assert job.requests().stop_request == "discard"
        job.finish({})


def test_a_job_of_another_home_waits_until_the_device_is_free(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two studios of one user on one machine: the second one says what it waits for."""
    with open_db(project.folder) as db:
        first = jobs.add(db, Job("train"))
    with JobContext(project.folder, first, project.path("jobs")) as job:
        job.wait_for_turn()
        monkeypatch.setenv("RETUNE_HOME", str(tmp_path / "another"))
        other = create_project("Stella")
        with open_db(other.folder) as db:
            second = jobs.add(db, Job("train"))

        def look(_seconds: float) -> None:
            with open_db(other.folder) as db:
                phases.append(jobs.get(db, second.id).phase)
            job.finish({}) if len(phases) < 2 else job.__exit__(None, None, None)

        phases: list[str] = []
        monkeypatch.setattr(module.time, "sleep", look)
        with JobContext(other.folder, second, other.path("jobs")) as late:
            late.wait_for_turn()
            late.finish({})
    assert len(phases) == 2 and phases[1].startswith("waiting for the device, which a job of another studio")
    with open_db(other.folder) as db:
        assert jobs.get(db, second.id).state == "finished"


def test_a_lock_is_for_each_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And none is held by one who could not have all."""
    gpus = [machine.card(2**33)] * 2
    monkeypatch.setattr(machine, "_gpus", lambda: gpus)

    def lock(home: str, shown: str | None) -> DeviceLock:
        monkeypatch.setenv("RETUNE_HOME", str(tmp_path / home))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        return DeviceLock()

    second, first, both = lock("a", "1"), lock("b", "0"), lock("c", None)
    assert second.take() and not both.take() and both.is_elsewhere
    assert first.take()  # what `both` had of it is given back
    second.release()
    first.release()
    assert both.take()
    assert not lock("c", "0").take() and not lock("d", "0").take() and lock("e", "GPU-5f/..").take()
    gpus.clear()
    assert lock("f", "0").take() and not lock("g", None).take()  # both compute on the processor


def test_locks_are_not_put_where_somebody_else_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = tmp_path / "chosen"
    chosen.symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setenv("RETUNE_LOCKS", str(chosen))
    assert locks_folder() == chosen  # a person's choice is not passed over
    monkeypatch.delenv("RETUNE_LOCKS")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"retune-{os.getuid()}"
    assert locks_folder() == own and own.stat().st_mode & 0o777 == 0o700
    own.rmdir()
    own.symlink_to(tmp_path, target_is_directory=True)
    assert locks_folder() == tmp_path / "cache" / "retune" / "locks"
