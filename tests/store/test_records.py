"""What goes into the tables comes out again; what does not exist is named with what does."""

import math
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.errors import CheckpointError, DataError, JobError, StudioError
from studio.store import checkpoints, datasets, evaluations, jobs, metrics, open_db, runs, samples
from studio.store.checkpoints import Checkpoint, Output
from studio.store.datasets import Dataset
from studio.store.evaluations import Answer, Evaluation
from studio.store.jobs import ENDED_STATES, LIVE_STATES, Job
from studio.store.records import new_id
from studio.store.runs import Run
from studio.store.samples import Sample

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


def test_ids_sort_by_time_and_differ() -> None:
    ids = [new_id() for _ in range(500)]
    assert len(set(ids)) == 500 and [one[:21] for one in ids] == sorted(one[:21] for one in ids)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    args=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4),
    title=st.text(st.characters(codec="utf-8")),
)
def test_a_job_comes_back_as_it_was(tmp_path: Path, args: dict, title: str) -> None:
    job = Job("convert", title=title, args=args, needs_device=False)
    with open_db(tmp_path) as db:
        jobs.add(db, job)
        found = jobs.get(db, job.id)
    assert found == job


def test_needs_device_is_truth_after_reading(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        jobs.add(db, Job("serve", id="s", needs_device=False))
        assert not jobs.get(db, "s").needs_device


def test_an_ended_job_never_runs_again(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        for ended in ENDED_STATES:
            job = jobs.add(db, Job("train"))
            jobs.move(db, job.id, "running")
            jobs.move(db, job.id, ended, "because")
            for state in (*LIVE_STATES[1:], *ENDED_STATES):
                with pytest.raises(JobError, match=ended):
                    jobs.move(db, job.id, state)
            after = jobs.get(db, job.id)
            assert (after.state, after.cause) == (ended, "because") and after.started_at <= after.finished_at


def test_a_queued_job_does_not_finish(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        job = jobs.add(db, Job("train"))
        with pytest.raises(JobError, match="queued and cannot become finished"):
            jobs.move(db, job.id, "finished")
        with pytest.raises(JobError, match="unknown"):
            jobs.move(db, "nobody", "running")


def test_each_request_is_taken_once(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        job = jobs.add(db, Job("train"))
        jobs.request(db, job.id, save_request=1)
        jobs.request(db, job.id, stop_request="save")
    taken = []

    def take() -> None:
        with open_db(tmp_path) as db:
            taken.append(jobs.take_requests(db, job.id))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.save_request for one in taken) == 1
    assert all(one.stop_request == "save" for one in taken), "a stop stays until the job has ended"


def test_jobs_by_state_and_kind(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        for number, kind in enumerate(("train", "convert", "train")):
            jobs.add(db, Job(kind, id=str(number)))
        jobs.move(db, "0", "failed", "x")
        assert [job.id for job in jobs.listed(db)] == ["2", "1", "0"]
        assert [job.id for job in jobs.listed(db, LIVE_STATES, "train")] == ["2"]
        with pytest.raises(JobError, match="no job 'nope'"):
            jobs.get(db, "nope")


def test_metrics_replace_and_gap(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        metrics.record(db, "r", 1, {"train/loss": 3.0, "valid/loss": 4.0})
        metrics.record(db, "r", 1, {"train/loss": 2.5})
        metrics.record(db, "r", 2, {"train/loss": math.nan, "train/grad_norm": math.inf})
        metrics.record(db, "r", 3, {"train/loss": 2.0})
        assert [(p.step, p.value) for p in metrics.series(db, "r", "train/loss")] == [(1, 2.5), (2, None), (3, 2.0)]
        assert [p.step for p in metrics.series(db, "r", "train/loss", after_step=1)] == [2, 3]
        assert metrics.latest(db, "r") == {"train/loss": 2.0, "valid/loss": 4.0}
        assert metrics.names(db, "r") == ["train/grad_norm", "train/loss", "valid/loss"]


def test_what_a_resumed_run_computes_again_is_forgotten(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        for step in (1, 2, 3):
            metrics.record(db, "r", step, {"train/loss": step})
            metrics.record(db, "other", step, {"train/loss": step})
            samples.add(db, [Sample("r", step, "Who are you?", "I")])
        metrics.forget_after(db, "r", 2)
        assert [p.step for p in metrics.series(db, "r", "train/loss")] == [1, 2]
        assert [s.step for s in samples.listed(db, "r")] == [1, 2]
        assert len(metrics.series(db, "other", "train/loss")) == 3


def test_samples_of_a_step_are_replaced(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        samples.add(db, [Sample("r", 0, "a", "1"), Sample("r", 0, "b", error="no memory")])
        samples.add(db, [Sample("r", 0, "a", "2")])
        assert [(s.prompt, s.text) for s in samples.listed(db, "r")] == [("a", "2")]
        samples.add(db, [])


def test_runs_bear_the_state_of_their_job(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        runs.add(db, Run("tiny-1", "tiny", "starter", "lora"))
        assert runs.get(db, "tiny-1").state == ""
        job = jobs.add(db, Job("train"))
        runs.update(db, "tiny-1", job_id=job.id, num_steps=9)
        jobs.move(db, job.id, "running")
        run = runs.get(db, "tiny-1")
        assert (run.state, run.num_steps) == ("running", 9)
        assert runs.next_id(db, "tiny") == "tiny-2" and runs.next_id(db, "other") == "other-1"
        with pytest.raises(JobError, match="Runs here: tiny-1"):
            runs.get(db, "tiny-7")
        runs.update(db, "tiny-1", archived_at="2026-01-01")
        assert runs.listed(db) == []


def test_datasets_are_replaced_and_named(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        datasets.put(db, Dataset("identity", "identity", "data/identity.jsonl", "f1", 3, origin={"seed": 0}))
        datasets.put(db, Dataset("identity", "identity", "data/identity.jsonl", "f2", 4))
        assert datasets.get(db, "identity").fingerprint == "f2"
        with pytest.raises(DataError, match="there are: identity"):
            datasets.get(db, "general")
        datasets.remove(db, "identity")
        assert datasets.listed(db) == []


def test_checkpoints_and_outputs(tmp_path: Path) -> None:
    with open_db(tmp_path) as db:
        for step in (10, 20):
            checkpoints.put(db, Checkpoint("r", step, f"runs/r/step_{step}.pth", "s", 5))
        checkpoints.put(db, Checkpoint("r", 20, "runs/r/step_20.pth", "t", 6))
        assert [(c.step, c.sha256) for c in checkpoints.listed(db, "r")] == [(20, "t"), (10, "s")]
        with pytest.raises(CheckpointError, match="There are: 20, 10"):
            checkpoints.get(db, "r", 15)
        checkpoints.remove(db, "r", 10)
        first = checkpoints.put_output(db, Output("hf", "hf/r-step_20", "r", 20))
        second = checkpoints.put_output(db, Output("hf", "hf/r-step_20", "r", 20, {"sha256": "u"}))
        assert first.id != second.id
        assert checkpoints.outputs(db, "hf") == [second] and checkpoints.outputs(db, "merged") == []


def test_a_scorecard_and_its_answers_are_stored_together(tmp_path: Path) -> None:
    evaluation = Evaluation("j", "r step 2", "starter", "h", "identity", {"identity": {"tuned": [12, 12]}})
    answers = [Answer(evaluation.id, n, "identity", "name", "en", "q", "b", "a", {"marks": [1]}) for n in range(3)]
    with open_db(tmp_path) as db:
        evaluations.add(db, evaluation, answers)
        assert evaluations.get(db, evaluation.id) == evaluation
        assert evaluations.answers(db, evaluation.id) == answers
        with pytest.raises(StudioError):
            evaluations.get(db, "none")
        broken = Evaluation("j", "s", "starter", "h", "identity", {})
        with pytest.raises(Exception, match="UNIQUE"):
            evaluations.add(db, broken, answers)
        assert [one.id for one in evaluations.listed(db)] == [evaluation.id], "half a scorecard must not stay"
