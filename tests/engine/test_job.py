"""A job's own side: its end is told, even when the database cannot be written for a while, or at all."""

import signal
from collections.abc import Callable, Iterator

import pytest

from studio import jobs as watchers
from studio.engine import job as module
from studio.engine.job import JobContext
from studio.errors import StoreBusyError, StoreError
from studio.projects import Project
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
