"""`retune jobs`: what runs in any project, and stopping it."""

import json

import psutil
import pytest

from studio import jobs as doors
from studio.projects import Project, create_project
from studio.store import jobs, open_db
from studio.store.jobs import Job
from tests.cli.conftest import Retune


def live_job(project: Project, kind: str = "evaluate") -> str:
    """A job whose process is this one."""
    me = psutil.Process()
    row = Job(kind, f"{kind} it", state="running", pid=me.pid, process_created=me.create_time(), phase="asking")
    row.current, row.total, row.unit = 3, 9, "prompts"
    with open_db(project.folder) as db:
        return jobs.add(db, row).id


def test_live_jobs_of_all_projects_are_listed(retune: Retune, project: Project) -> None:
    assert "Nothing runs" in retune("jobs", "list")
    first, second = live_job(project), live_job(create_project("Other"), "convert")
    with open_db(project.folder) as db:
        jobs.add(db, Job("merge", state="finished"))
    listed = json.loads(retune("jobs", "list", "--json"))
    assert [(each["project"], each["job"]["id"]) for each in listed] == [("luna", first), ("other", second)]
    said = retune("jobs", "list")
    assert first in said and "asking 3/9 prompts" in said and "merge" not in said


@pytest.mark.parametrize(("words", "asked"), [([], "save"), (["--discard"], "discard")])
def test_a_job_is_asked_to_stop(retune: Retune, project: Project, words: list[str], asked: str) -> None:
    create_project("Newer")
    job_id = live_job(project)
    assert "asked to stop" in retune("jobs", "stop", job_id, *words)
    with open_db(project.folder) as db:
        assert (jobs.get(db, job_id).state, jobs.get(db, job_id).stop_request) == ("stopping", asked)


def test_a_job_is_killed(retune: Retune, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_kill_tree", lambda job: None)
    job_id = live_job(project)
    assert "killed" in retune("jobs", "stop", job_id, "--kill")
    with open_db(project.folder) as db:
        assert (jobs.get(db, job_id).state, jobs.get(db, job_id).cause) == ("stopped", doors.KILLED)
    assert "jobs list" in retune("jobs", "stop", job_id, code=1)
