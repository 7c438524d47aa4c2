"""The `train` verb from a frozen config to its last checkpoint, with everything that a person may ask on the way."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from studio import forecast, processes
from studio.config.schema import RunConfig
from studio.config.yaml import save_config
from studio.engine import prepare, sampling, train, twice
from studio.engine.distributed import Alone
from studio.engine.requests import Requests
from studio.engine.safe_load import load_pth
from studio.estimate import Twice
from studio.projects import Project
from studio.store import checkpoints, jobs, metrics, open_db, run_events, runs, samples
from studio.ui.event_words import sentence
from tests.engine.conftest import add_dataset, add_probes, add_run, conversations, train_here

Make = Callable[..., RunConfig]
EACH_STEP = ("train/loss", "train/learning_rate", "train/grad_norm", "train/trained_tokens", "train/tokens_per_second")


def series(project: Project, run_id: str, name: str) -> list[tuple[int, float | None]]:
    with open_db(project.folder) as db:
        return [(point.step, point.value) for point in metrics.series(db, run_id, name)]


def asked(project: Project, run_id: str) -> list[samples.Sample]:
    with open_db(project.folder) as db:
        return samples.listed(db, run_id)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_learns_and_leaves_numbers_samples_and_a_checkpoint(
    training_project: Project, tiny_config: Make, method: str
) -> None:
    run_id = add_run(training_project, tiny_config(method=method, **{"train.num_steps": 8}))
    job = train_here(training_project, run_id)
    assert (job.state, job.cause) == ("finished", "")
    for name in (*EACH_STEP, "system/memory_bytes"):
        assert [step for step, _ in series(training_project, run_id, name)] == list(range(1, 9)), name
    assert [step for step, _ in series(training_project, run_id, "valid/loss")] == [0, 2, 4, 6, 8]
    losses = [value for _, value in series(training_project, run_id, "train/loss")]
    assert losses[-1] < losses[0]
    assert sorted({sample.step for sample in asked(training_project, run_id)}) == [0, 3, 6, 8]
    assert not any(sample.error for sample in asked(training_project, run_id))
    assert job.result["steps"] == 8 and job.result["final_loss"] == losses[-1]
    assert job.result["checkpoint"] == f"runs/{run_id}/step_8.pth"
    with open_db(training_project.folder) as db:
        assert runs.get(db, run_id).step == runs.get(db, run_id).num_steps == 8
        assert [each.step for each in checkpoints.listed(db, run_id)] == [8]
    content = load_pth(training_project.path(job.result["checkpoint"]))
    assert content["meta"]["method"] == method and content["meta"]["step"] == 8
    assert all(("lora_" in name) == (method != "full") for name in content["state_dict"])
    assert (content["meta"]["adapter_config"] is None) == (method == "full")


def test_epochs_become_steps(training_project: Project, tiny_config: Make) -> None:
    """22 + 7 rows after validation, half each: an epoch is 44 rows, so half an epoch is 6 steps of 4."""
    run_id = add_run(training_project, tiny_config(**{"train.num_steps": None, "train.num_epochs": 0.5}))
    assert train_here(training_project, run_id).result["steps"] == 6


def test_a_failing_sample_is_stored_and_training_goes_on(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> list[list[int]]:
        raise RuntimeError("no more tokens")

    monkeypatch.setattr(sampling, "generate", broken)
    run_id = add_run(training_project, tiny_config())
    assert train_here(training_project, run_id).state == "finished"
    assert {sample.error for sample in asked(training_project, run_id)} == {"RuntimeError: no more tokens"}


def test_save_now_and_sample_now_are_done_at_the_next_border(training_project: Project, tiny_config: Make) -> None:
    run_id = add_run(training_project, tiny_config(**{"record.keep_last": 5, "record.sample_every_steps": 0}))
    train_here(training_project, run_id, save_request=1, sample_request=1)
    with open_db(training_project.folder) as db:
        assert sorted(each.step for each in checkpoints.listed(db, run_id)) == [1, 6]
    assert sorted({sample.step for sample in asked(training_project, run_id)}) == [0, 1, 6]


def stop_after(step: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the job to stop once a step is recorded, as a person with a button would; by a signal where the disk is
    full."""
    read, how, by_signal = Requests.read, how.removesuffix(" by signal"), how.endswith(" by signal")

    def ask_and_read(requests: Requests) -> None:
        job = requests._job
        with open_db(job.folder) as db:
            if runs.get(db, job.run_id).step >= step:
                if by_signal:
                    os.kill(os.getpid(), processes.STOP_SIGNALS[how])
                else:
                    jobs.request(db, job.id, stop_request=how)
        read(requests)

    monkeypatch.setattr(Requests, "read", ask_and_read)


@pytest.mark.parametrize(
    ("how", "saved"), [("save", [2]), ("discard", []), ("save by signal", [2]), ("discard by signal", [])]
)
def test_stop_ends_at_the_border_with_or_without_saving(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, how: str, saved: list[int]
) -> None:
    stop_after(2, how, monkeypatch)
    run_id = add_run(training_project, tiny_config())
    job = train_here(training_project, run_id)
    assert job.state == "stopped" and job.result["steps"] == 2
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id)] == saved


def test_a_stop_does_not_wait_for_samples(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers of thousands of tokens before the first step: what was begun is not kept as an answer."""
    stop_after(0, "discard", monkeypatch)
    run_id = add_run(training_project, tiny_config(**{"record.sample_max_new_tokens": 4096}))
    job = train_here(training_project, run_id)
    assert job.state == "stopped" and job.result["steps"] == 0
    assert not asked(training_project, run_id)


MEASURING = ["evaluating", "asking held-out questions", "sampling"]


@pytest.mark.parametrize("phase", MEASURING)
def test_what_a_stop_left_out_is_done_when_the_run_goes_on(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """A stop comes while the second step is evaluated, probed or sampled, and waits for none of it."""
    add_probes(training_project)
    settings = {f"record.{what}_every_steps": 2 for what in ("evaluate", "probe", "sample")}
    config = tiny_config(**settings | {"record.best_by": "valid_loss"})
    whole, broken = add_run(training_project, config), add_run(training_project, config)
    train_here(training_project, whole)
    with monkeypatch.context() as patches:
        patches.setattr(Requests, "read", stop_while(phase))
        assert train_here(training_project, broken).result["steps"] == 2
    assert {each.step for each in asked(training_project, broken)} == {0}
    found = measured(training_project, broken)
    assert [len([step for step, _ in found[name] if step == 2]) for name in MEASURED] == [
        phase != MEASURING[0], phase == MEASURING[2],
    ]  # fmt: skip
    for _ in range(2):  # the checkpoint still knows what is owed; it is not stored twice
        train_here(training_project, broken, resume=f"runs/{broken}/step_2.pth")
        assert told(training_project, broken) == told(training_project, whole)
        assert measured(training_project, broken) == measured(training_project, whole)
    with open_db(training_project.folder) as db:
        assert "rows_missing" not in {each.kind for each in run_events.listed(db, broken)}
        best = [[each.step for each in checkpoints.listed(db, run) if each.is_best] for run in (whole, broken)]
    assert best[0] == best[1] != []


MEASURED = ("valid/loss", "probe/identity")


def measured(project: Project, run_id: str) -> dict[str, list[tuple[int, float | None]]]:
    return {name: series(project, run_id, name) for name in (*MEASURED, "train/loss")}


def told(project: Project, run_id: str) -> list[tuple[int, str, str]]:
    return [(each.step, each.prompt, each.text) for each in asked(project, run_id)]


def stop_while(phase: str) -> Callable[[Requests], None]:
    """As a person whose wish to stop comes in this phase of the second step."""

    def read(requests: Requests) -> None:
        job = requests._job
        with open_db(job.folder) as db:
            if runs.get(db, job.run_id).step == 2 and job._progress["phase"] == phase:
                requests.stop = "save"

    return read


def test_a_stop_while_it_loads_waits_for_no_evaluation(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(0, "save", monkeypatch)
    run_id = add_run(training_project, tiny_config())
    assert train_here(training_project, run_id).state == "stopped"
    assert not series(training_project, run_id, "valid/loss") and not asked(training_project, run_id)


def test_checkpoints_rotate(training_project: Project, tiny_config: Make) -> None:
    run_id = add_run(training_project, tiny_config(**{"record.save_every_steps": 1, "record.keep_last": 2}))
    train_here(training_project, run_id)
    names = sorted(path.name for path in training_project.path("runs", run_id).glob("step_*"))
    assert names == ["step_5.manifest.json", "step_5.pth", "step_6.manifest.json", "step_6.pth"]
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id)] == [6, 5]


def test_training_that_breaks_down_keeps_its_last_checkpoint(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.Trainer.step

    def poisoned(trainer: train.Trainer, examples: list, number: int) -> object:
        if number == 4:
            with torch.no_grad():
                next(iter(trainer.model.parameters()))[:] = math.nan
        return real(trainer, examples, number)

    monkeypatch.setattr(train.Trainer, "step", poisoned)
    run_id = add_run(training_project, tiny_config(method="full", **{"record.save_every_steps": 2}))
    job = train_here(training_project, run_id)
    assert job.state == "failed" and "step 4" in job.cause and "learning_rate" in job.cause
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id)] == [2]


FAILURES = [
    ({"data.sources": {"nothing": 1.0}}, "no dataset 'nothing'"),
    ({"model.base": "/no/such/model"}, "is not a complete model"),
    ({"data.max_length": 16}, "has a token to train on"),
    ({"lora.target_modules": "no_such_layer"}, "lora.target_modules"),
    ({"train.optimizer": "paged_adamw_8bit"}, "adamw"),
]


@pytest.mark.parametrize(("settings", "cause"), FAILURES, ids=[next(iter(each)) for each, _ in FAILURES])
def test_what_cannot_be_trained_says_why(
    training_project: Project, tiny_config: Make, settings: dict, cause: str
) -> None:
    add_dataset(training_project, "identity", [row for row in conversations(24) if row.messages[0].role == "system"])
    config = tiny_config(**{"data.sources": {"identity": 1.0}, **settings})
    job = train_here(training_project, add_run(training_project, config))
    assert job.state == "failed" and cause in job.cause


def test_a_corpus_that_changed_cannot_be_resumed(training_project: Project, tiny_config: Make) -> None:
    run_id = add_run(training_project, tiny_config())
    train_here(training_project, run_id)
    add_dataset(training_project, "identity", conversations(30))
    job = train_here(training_project, run_id, resume="auto")
    assert job.state == "failed" and "identity changed" in job.cause


def test_resume_falls_back_to_the_checkpoint_before_and_says_so(
    training_project: Project, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = add_run(training_project, tiny_config(**{"record.save_every_steps": 3}))
    whole = train_here(training_project, run_id).result
    damaged = training_project.path("runs", run_id, "step_6.pth")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    damaged_size = damaged.stat().st_size
    job = train_here(training_project, run_id, resume="auto")
    assert job.state == "finished" and job.result["final_loss"] == whole["final_loss"]
    printed = capsys.readouterr().out
    assert "resuming from step_3.pth" in printed
    with open_db(training_project.folder) as db:
        [told] = [sentence([each]) for each in run_events.listed(db, run_id) if each.kind == "passed_over"]
    size = damaged_size + 100
    assert (
        told == f"step_6.pth was passed over: it has {damaged_size} bytes, its manifest says {size}."
        and told in printed
    )


def test_resumed_from_an_earlier_step_the_way_that_was_left_is_forgotten(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = add_run(training_project, tiny_config(**{"record.save_every_steps": 2, "record.keep_last": 5}))
    train_here(training_project, run_id)
    with monkeypatch.context() as patch:
        stop_after(3, "discard", patch)
        train_here(training_project, run_id, resume=f"runs/{run_id}/step_2.pth")
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id)] == [2]
    assert train_here(training_project, run_id, resume="auto").result["steps"] == 6
    with open_db(training_project.folder) as db:
        assert [each.step for each in checkpoints.listed(db, run_id)] == [6, 4, 2]


def test_a_checkpoint_of_another_run_is_refused(training_project: Project, tiny_config: Make) -> None:
    first, second = (add_run(training_project, tiny_config()) for _ in range(2))
    train_here(training_project, first)
    job = train_here(training_project, second, resume=f"runs/{first}/step_6.pth")
    assert job.state == "failed" and f"one of run {first!r}, not of {second!r}" in job.cause
    assert training_project.path("runs", first, "step_6.pth").is_file()


@pytest.mark.parametrize("settings", [{"train.num_steps": 8}, {"train.gradient_accumulation_steps": 1}])
def test_a_run_of_another_length_cannot_go_on(
    training_project: Project, tiny_config: Make, settings: dict[str, int]
) -> None:
    run_id = add_run(training_project, tiny_config())
    train_here(training_project, run_id)
    save_config(training_project.path("runs", run_id, "config.yaml"), tiny_config(**settings))
    job = train_here(training_project, run_id, resume="auto")
    assert job.state == "failed" and "6 steps, at row 24" in job.cause and "new run" in job.cause


def test_a_checkpoint_outside_the_project_is_refused(training_project: Project, tiny_config: Make) -> None:
    run_id = add_run(training_project, tiny_config())
    job = train_here(training_project, run_id, resume="../../../etc/passwd")
    assert job.state == "failed" and "outside" in job.cause


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_new_run_continues_from_the_weights_of_another(
    training_project: Project, tiny_config: Make, method: str
) -> None:
    first = train_here(training_project, add_run(training_project, tiny_config(method=method)))
    source = training_project.path(first.result["checkpoint"])
    still = {
        "train.learning_rate": 1e-12,
        "train.num_steps": 1,
        "train.warmup_steps": 0,
        "model.continue_from": str(source),
    }
    second = train_here(training_project, add_run(training_project, tiny_config(method=method, **still)))
    assert (second.state, second.result["steps"]) == ("finished", 1)
    before, after = (load_pth(training_project.path(job.result["checkpoint"])) for job in (first, second))
    assert all(torch.allclose(after["state_dict"][name], each) for name, each in before["state_dict"].items())
    assert after["meta"]["step"] == 1


def test_activations_are_computed_twice_where_memory_asks_for_it_and_a_resume_keeps_to_it(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Told in log and run; memory that is free again at the resume changes nothing."""
    seen: list[bool] = []
    real = train.Trainer.step

    def step(trainer: train.Trainer, *arguments: Any) -> Any:
        seen.append(any(getattr(each, "gradient_checkpointing", False) for each in trainer.model.modules()))
        return real(trainer, *arguments)

    monkeypatch.setattr(train.Trainer, "step", step)
    config = tiny_config(**{"train.gradient_checkpointing": "auto", "record.save_every_steps": 3})
    roomy, tight = add_run(training_project, config), add_run(training_project, config)
    monkeypatch.setattr(twice, "_free_here", lambda num_processes: 2**50)
    train_here(training_project, roomy)
    assert not any(seen) and "gradient checkpointing is off: a step may take" in capfd.readouterr().out
    with monkeypatch.context() as patches:
        patches.setattr(twice, "_free_here", lambda num_processes: 2**20)
        seen.clear()
        assert train_here(training_project, tight).state == "finished"
    assert all(seen) and "gradient checkpointing is on: a step may take" in capfd.readouterr().out
    with open_db(training_project.folder) as db:
        found = [run_events.listed(db, run) for run in (roomy, tight)]
        kept = [runs.get(db, run).detail["gradient_checkpointing"] for run in (roomy, tight)]
    assert [[event.kind for event in events] for events in found] == [[], ["computed_twice"]]
    assert sentence(found[1]).startswith("Gradient checkpointing is on, for memory: a step may take ")
    assert kept == [False, True]
    with open_db(training_project.folder) as db:
        runs.note(db, tight, predicted={"memory_bytes": 1, "seconds_per_step": None})
        outcome = forecast.outcome(training_project, runs.get(db, tight))
    assert outcome and outcome.predicted_bytes == found[1][0].detail["computed_twice"]
    before = series(training_project, tight, "train/loss")
    seen.clear()
    train_here(training_project, tight, resume=f"runs/{tight}/step_3.pth")
    assert seen == [True] * 3 and series(training_project, tight, "train/loss") == before


class Second(Alone):
    """Of two processes, on a machine of its own; `heard` is what the first one says."""

    rank, world = 1, 2

    def __init__(self, *heard: Any) -> None:
        self._heard = iter(heard)

    def share(self, value: Any) -> Any:
        return next(self._heard)


def test_what_the_first_process_chooses_or_chose_before_counts_in_all() -> None:
    """Another machine's studio has no record of what the run did."""

    def choose() -> Twice:
        raise AssertionError("only the first process chooses")

    cpu, choice = torch.device("cpu"), Twice(True, 3, 2, 1)
    assert prepare._choose_together(Second(None, asdict(choice)), None, choose, cpu) == (True, choice)
    assert prepare._choose_together(Second(False), None, choose, cpu) == (False, None)
    assert prepare._choose_together(Alone(), True, choose, cpu) == (True, None)
    assert prepare._choose_together(Alone(), None, lambda: choice, cpu) == (True, choice)
