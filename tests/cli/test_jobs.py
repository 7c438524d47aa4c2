"""`retune jobs`: what runs in any project, and stopping it."""

import json

import psutil
import pytest

from studio import jobs as doors
from studio.projects import Project, create_project
from studio.store import checkpoints, jobs, open_db, run_events, runs
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


def test_why_a_job_ended_is_told_in_the_language_of_the_shell(
    retune: Retune, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = "Rank 1: The folder 'm' is not a complete model: no weights. Fetch the model again."
    with open_db(project.folder) as db:
        jobs.add(db, Job("merge", state="failed", cause=cause))
    assert "not a complete model" in " ".join(retune("jobs", "list", "--all").split())
    monkeypatch.setenv("RETUNE_LANGUAGE", "zh")
    said = "".join(retune("jobs", "list", "--all").split())
    assert "请重新获取模型" in said and "complete" not in said
    assert json.loads(retune("jobs", "list", "--all", "--json"))[0]["job"]["cause"] == cause


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


def waiting_job(project: Project, run_id: str) -> str:
    """A job in line whose process is this one."""
    me = psutil.Process()
    with open_db(project.folder) as db:
        return jobs.add(db, Job("train", run_id, run_id=run_id, pid=me.pid, process_created=me.create_time())).id


def test_the_queue_is_moved_held_and_released(retune: Retune, project: Project) -> None:
    first, second, third = (
        waiting_job(project, "a"),
        waiting_job(create_project("Other"), "b"),
        waiting_job(project, "c"),
    )
    assert "moved first" in retune("jobs", "move", third, "first")
    assert [job.id for _, job in doors.waiting()] == [third, first, second]
    retune("jobs", "move", third, "down"), retune("jobs", "move", first, "last")
    assert [job.id for _, job in doors.waiting()] == [third, second, first]
    assert "held" in retune("jobs", "hold", second)
    assert "held" in retune("jobs", "list")
    assert "released" in retune("jobs", "release", second)
    assert "Allowed: up, down, first, last" in retune("jobs", "move", second, "sideways", code=1)
    assert "no job" in retune("jobs", "hold", "x", code=1)
    assert "does not wait" in retune("jobs", "move", live_job(project), "up", code=1)


def test_an_ended_job_is_tried_again(retune: Retune, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_db(project.folder) as db:
        ended = jobs.add(db, Job("fetch", state="failed", cause="No net.", args={"base": "x"})).id
    assert "No net." in retune("jobs", "list", "--all")
    monkeypatch.setattr(doors, "_start_process", lambda *_: None)
    assert "tried again as" in retune("jobs", "retry", ended)
    (again,) = [job for job in doors.refresh(project.folder) if job.id != ended]
    assert (again.kind, again.args, again.state) == ("fetch", {"base": "x"}, "queued")
    assert "Only a job that has ended" in retune("jobs", "retry", again.id, code=1)


def test_a_run_tells_what_happened_and_which_checkpoint_is_best(retune: Retune, project: Project) -> None:
    with open_db(project.folder) as db:
        runs.add(db, runs.Run("tiny-1", "tiny", "starter", "lora"))
        run_events.add(db, run_events.RunEvent("tiny-1", 5, "smaller_micro_batch", {"before": 8, "now": 4}))
        for step in (4, 6):
            checkpoints.put(db, checkpoints.Checkpoint("tiny-1", step, f"runs/tiny-1/step_{step}.pth", "0", 10))
        checkpoints.mark_best(db, "tiny-1", 4, "valid_loss", 1.5)
    said = retune("runs", "show", "tiny-1")
    assert "Out of memory at step 5: micro-batches of 4 from there on, not 8." in said
    assert said.count("valid loss 1.5") == 1
    (event,) = json.loads(retune("runs", "show", "tiny-1", "--json"))["events"]
    assert event["detail"] == {"before": 8, "now": 4}
