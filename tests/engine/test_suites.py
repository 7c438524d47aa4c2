"""All checkpoints of a run asked a suite in one job: chats, progress kept over a kill, nothing measured twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from studio import faults, jobs, runs, suites
from studio.engine.answers import Answer, Messages
from studio.engine.examiner import hold
from studio.paths import sha256_of
from studio.probes.suite import Probe
from studio.projects import Project
from studio.store import checkpoints, evaluations, open_db
from studio.store import runs as store_runs
from studio.store.checkpoints import Checkpoint
from studio.store.jobs import Job
from studio.store.runs import Run
from tests.engine.conftest import live_here
from tests.engine.folders import config_for, full_checkpoint, lora_checkpoint

SUITE = """max_new_tokens: 6
groups:
  - name: shop
    probes:
      - ask: Tell me about the red house.
        assert: [{type: not-contains, value: ChatGPT}]
      - turns: [Hello, "And who are you?"]
        assert: [{type: mentions, value: Luna}]
  - name: facts
    kind: general
    assert: [{type: not-mentions, value: [Luna]}]
    probes:
      - ask: The capital of France?
        reference: Paris is the capital.
      - ask: What is white?
"""


@pytest.fixture
def run_id(project: Project, tiny_model: Path) -> str:
    """A run with three checkpoints that was trained nowhere."""
    config = config_for(tiny_model)
    folder = project.path("runs", "tiny-1")
    folder.mkdir()
    with open_db(project.folder) as db:
        store_runs.add(db, Run("tiny-1", config.name, str(tiny_model), "lora"))
        for step in (2, 4, 6):
            path = lora_checkpoint(tiny_model, folder / f"step_{step}.pth", step=step, seed=step)
            found = Checkpoint("tiny-1", step, project.relative(path), sha256_of(path), path.stat().st_size)
            checkpoints.put(db, found)
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    suites.save_text(project, "shop", SUITE)
    return "tiny-1"


def evaluated(project: Project, run_id: str, *steps: int) -> Job:
    """The job that scores these checkpoints, all by default, lived in this process."""
    with open_db(project.folder) as db:
        base = store_runs.get(db, run_id).base
        chosen = steps or sorted(each.step for each in checkpoints.listed(db, run_id))
    subjects = [{"label": f"step {step}", "run_id": run_id, "step": step} for step in chosen]
    job = live_here(project, Job("evaluate", args={"base": base, "subjects": subjects, "suite": "shop"}))
    assert job.state == "finished", job.cause
    return job


def test_each_turn_is_answered_before_the_next_is_asked() -> None:
    asked: list[str] = []

    def ask_all(chats: Sequence[Messages]) -> list[Answer]:
        asked.extend(" | ".join(message["content"] for message in chat) for chat in chats)
        return [Answer(f"answer {len(chat)}", True) for chat in chats]

    first = {"role": "user", "content": "a"}
    probes = [Probe("g", "other", (first,), follow_ups) for follow_ups in (("b", "c"), (), ("d",))]
    assert [answer.text for answer in hold(probes, ask_all)] == ["answer 5", "answer 1", "answer 3"]
    assert asked == ["a"] * 3 + ["a | answer 1 | b", "a | answer 1 | d", "a | answer 1 | b | answer 3 | c"]


def test_all_checkpoints_in_one_job_and_nothing_twice(project: Project, run_id: str) -> None:
    job = evaluated(project, run_id)
    assert job.result["num_from_cache"] == 0
    with open_db(project.folder) as db:
        found = evaluations.of_run(db, run_id, "shop")
        answers = {each.step: evaluations.answers(db, each.id) for each in found}
    assert [each.id for each in found] == job.result["evaluations"] and [each.step for each in found] == [2, 4, 6]
    assert len({each.weights_hash for each in found}) == 3
    assert [answer.group for answer in answers[4]] == ["shop", "shop", "facts", "facts"]
    assert answers[4][1].prompt == "Hello\nAnd who are you?"
    scores = found[1].scores
    assert list(scores["groups"]) == ["shop", "facts"] and scores["leakage"]["tuned"]["total"] == 2
    assert scores["retention"]["num_tokens"] > 0 and scores["divergence"]["value"] > 0
    assert not list(project.path("hf").iterdir()), "what was converted for this must be gone"

    again = evaluated(project, run_id)
    assert again.result == {"evaluations": job.result["evaluations"], "num_from_cache": 3}
    more = SUITE + "      - ask: What is green?\n"
    suites.save_text(project, "shop", more)
    changed = evaluated(project, run_id, 4)
    with open_db(project.folder) as db:
        newest = evaluations.of_run(db, run_id, "shop")[1]
    assert [newest.id] == changed.result["evaluations"]
    assert newest.scores["setting"]["num_remembered"] == 5, "only the new probe is asked"


def test_a_killed_job_goes_on_at_the_answer_it_was_at(
    project: Project, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at an answer of the second checkpoint: 5 of the base, 5 of the first, 2 of the second. Started again, it
    asks only for what it lacks."""
    monkeypatch.setenv(faults.FAULT, "kill@answer:12")
    *_, first = jobs.watch(project.folder, runs.start_evaluate_all(project, run_id, suite="shop").id)
    assert first.state in ("failed", "lost")
    with open_db(project.folder) as db:
        assert [each.step for each in evaluations.of_run(db, run_id, "shop")] == [2]
    monkeypatch.delenv(faults.FAULT)
    second = evaluated(project, run_id)
    assert second.result["num_from_cache"] == 1
    with open_db(project.folder) as db:
        found = evaluations.of_run(db, run_id, "shop")
    assert [each.scores["setting"]["num_remembered"] for each in found] == [0, 2, 0]
    assert not list(project.path("hf").iterdir()), "the second's weights were left by the killed process"


def test_full_models_are_asked_without_leaving_a_copy(project: Project, run_id: str, tiny_model: Path) -> None:
    path = full_checkpoint(tiny_model, project.path("runs", "whole-1", "step_3.pth"), step=3)
    with open_db(project.folder) as db:
        store_runs.add(db, Run("whole-1", "tiny", str(tiny_model), "full"))
        checkpoints.put(db, Checkpoint("whole-1", 3, project.relative(path), sha256_of(path), path.stat().st_size))
    config = config_for(tiny_model, "full").model_dump(mode="json")
    project.path("runs", "whole-1", "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    job = evaluated(project, "whole-1")
    with open_db(project.folder) as db:
        found = evaluations.get(db, job.result["evaluations"][0])
    assert found.scores["divergence"]["value"] > 0
    assert not list(project.path("hf").iterdir())
