"""Runs of several real processes: they learn, save, are resumed bit-equal, and end with the cause when one dies."""

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from studio import faults, jobs, processes, runs
from studio.checkpoint_files import manifest_path
from studio.config.schema import RunConfig
from studio.engine import launch
from studio.engine.checkpoint import load_checkpoint
from studio.engine.ranks import RankContext
from studio.engine.zero_folder import read_own
from studio.errors import StudioError
from studio.projects import Project, create_project
from studio.store import jobs as store
from studio.store import metrics, open_db, run_events, samples
from studio.store.jobs import Job
from tests.damage import damage_file, watched
from tests.engine.conftest import add_dataset, conversations, fill
from tests.engine.folders import tensors_of

Make = Callable[..., RunConfig]
EXACT = ("train/loss", "train/learning_rate", "train/grad_norm", "train/trained_tokens", "valid/loss")
NUM_STEPS = 6
ONE = {"strategy": "none", "launcher": "none", "processes_per_node": 1}


def spread(make: Make, strategy: str, **settings: Any) -> RunConfig:
    zero = {"distributed.deepspeed": strategy} if strategy.startswith("zero") else {}
    chosen = {"distributed.strategy": "deepspeed" if zero else strategy, "distributed.processes_per_node": 2, **zero}
    steps = {"train.num_steps": NUM_STEPS, "train.gradient_accumulation_steps": 1, "record.save_every_steps": 2}
    return make(**{**steps, **chosen, "record.keep_last": 9, "lora.dropout": 0.1, **settings})


def numbers(project: Project, run_id: str) -> dict[str, list[tuple[int, float | None]]]:
    with open_db(project.folder) as db:
        return {name: [(each.step, each.value) for each in metrics.series(db, run_id, name)] for name in EXACT}


def final(project: Project, run_id: str) -> dict[str, torch.Tensor]:
    return read_own(project.path("runs", run_id, f"step_{NUM_STEPS}.pth"))["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def wait_for_step(project: Project, run_id: str, job: Job, step: int) -> Job:
    while runs.get_run(project, run_id).step < step:
        current = jobs.get(project.folder, job.id)
        assert current.live, f"{current.state}: {current.cause}"
        time.sleep(0.02)
    return jobs.get(project.folder, job.id)


def ranks_of(leader: int) -> list[psutil.Process]:
    return [each for each in psutil.Process(leader).children() if "studio.engine.ranks" in each.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "method"), [("ddp", "lora"), ("zero2", "full"), ("zero3", "lora")])
def test_two_ranks_learn_save_and_resume_bit_equal(
    training_project: Project, tiny_config: Make, strategy: str, method: str
) -> None:
    left_to_memory = {"train.gradient_checkpointing": "auto"} if strategy != "zero3" else {}
    config = spread(tiny_config, strategy, method=method, **left_to_memory)
    whole, job = runs.start_run(training_project, config)
    ended = runs.wait(training_project.folder, job, 300)
    assert ended.state == "finished" and ended.result["steps"] == NUM_STEPS
    before, weights = numbers(training_project, whole.id), final(training_project, whole.id)
    assert [step for step, _ in before["train/loss"]] == list(range(1, NUM_STEPS + 1))
    with open_db(training_project.folder) as db:
        asked = samples.listed(db, whole.id)
    assert sorted(each.step for each in asked) == sorted([0, 3, 6] * 2) and not any(each.error for each in asked)
    path = training_project.path("runs", whole.id, "step_2.pth")
    assert path.is_dir() == strategy.startswith("zero") and load_checkpoint(path)["meta"]["ranks"]["world"] == 2

    again = runs.resume_run(training_project, whole.id, f"runs/{whole.id}/step_2.pth")
    assert runs.wait(training_project.folder, again, 300).state == "finished"
    assert numbers(training_project, whole.id) == before
    assert same(final(training_project, whole.id), weights)
    require_converts(training_project, whole.id, weights)


def require_converts(project: Project, run_id: str, weights: dict[str, torch.Tensor]) -> None:
    """A folder becomes a Hugging Face folder as a file does, with the weights that the ranks had."""
    job = runs.start_convert(project, run_id, NUM_STEPS, fp32=True)
    done = runs.wait(project.folder, job, 120)
    found = tensors_of(Path(done.result["path"]))
    assert found and all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_a_disk_that_fills_up_is_waited_for_by_all_ranks(small_disk: Path, tiny_config: Make) -> None:
    """Nobody waits for ever for another rank, numbers wait in memory, and the end is saved once there is space."""
    project = create_project("test")
    add_dataset(project, "identity", conversations(24))
    add_dataset(project, "general", conversations(8, subject="garden"))
    config = spread(tiny_config, "zero2", **{"train.num_steps": 40, "record.sample_prompts": [], "record.keep_last": 2})
    run, job = runs.start_run(project, config)
    ranks = ranks_of(wait_for_step(project, run.id, job, 3).pid)
    filler = fill(small_disk)
    time.sleep(4)
    assert len(ranks) == 2 and all(each.is_running() for each in ranks)  # rows cannot be read just now
    filler.unlink()
    assert runs.wait(project.folder, job, 300).state == "finished"
    assert [step for step, _ in numbers(project, run.id)["train/loss"]] == list(range(1, 41))
    assert project.path("runs", run.id, "step_40.pth").is_dir() and not list(project.path("runs", run.id).glob(".*"))


SRUN = """#!{python}
import os, subprocess, sys
options = dict(each.split("=") for each in sys.argv[1:] if each.startswith("--"))
number, line = int(options["--ntasks-per-node"]), [each for each in sys.argv[1:] if not each.startswith("--")]
tasks = [
    subprocess.Popen(line, env=os.environ | {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task),
                                             "SLURM_NTASKS": str(number), "SLURM_JOB_ID": "7"}})
    for task in range(number)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "strategy"), [("torchrun", "ddp"), ("deepspeed", "zero2"), ("slurm", "ddp")])
def test_launchers_start_the_ranks_and_one_process_goes_on_where_they_ended(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    launcher: str, strategy: str
) -> None:  # fmt: skip
    """torchrun and DeepSpeed's launcher themselves; in place of srun, a script that sets the variables that it sets."""
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = {"lora.dropout": 0.0, "record.sample_prompts": [], "distributed.launcher": launcher}
    method = "prompt_tuning" if launcher == "deepspeed" else "lora"
    config = spread(tiny_config, strategy, method=method, **settings)
    if launcher == "deepspeed":  # the first rank's disk is full in the middle of the first save
        monkeypatch.setenv(faults.FAULT, "full@write mp_rank_N_model_states.pt")
    run, job = runs.start_run(training_project, config)
    ended = runs.wait(training_project.folder, job, 300)
    assert ended.state == "finished", ended.cause
    before = numbers(training_project, run.id)
    path = training_project.path("runs", run.id, "step_6.pth" if launcher == "deepspeed" else "step_2.pth")
    assert len(before["train/loss"]) == NUM_STEPS and load_checkpoint(path)["meta"]["ranks"]["world"] == 2
    if launcher == "torchrun":
        job = runs.resume_run(training_project, run.id, f"runs/{run.id}/step_2.pth", ONE)
        assert runs.wait(training_project.folder, job, 300).state == "finished"
        after = numbers(training_project, run.id)
        assert [value for _, value in after["train/loss"]] == pytest.approx(
            [value for _, value in before["train/loss"]], rel=1e-5
        )
    if launcher == "deepspeed":
        assert put_off(training_project, run.id) == [2] and not path.with_name("step_2.pth").exists()
        assert not list(path.parent.glob(".*"))
        require_converts(training_project, run.id, final(training_project, run.id))
        damage_at_random(path)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "strategy"), [("none", "ddp"), ("deepspeed", "zero2")])
def test_two_machines_train_one_model(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    launcher: str, strategy: str
) -> None:  # fmt: skip
    """Two homes on this machine stand for two machines, which share an address and the path of checkpoints."""
    machines = {"distributed.nodes": 2, "distributed.processes_per_node": 1, "distributed.launcher": launcher}
    config = spread(tiny_config, strategy, **machines, **{"record.sample_prompts": []})
    own = os.environ["RETUNE_HOME"]
    other = shutil.copytree(own, tmp_path / "other machine")
    monkeypatch.setenv("ADDR", "127.0.0.1")
    monkeypatch.setenv("PORT", str(launch._free_port()))
    started = []
    for rank, home in ((1, str(other)), (0, own)):
        monkeypatch.setenv("RETUNE_HOME", home)
        monkeypatch.setenv("RETUNE_LOCKS", str(Path(home) / "locks"))
        monkeypatch.setenv("NODE_RANK", str(rank))
        started.append((training_project.folder, *runs.start_run(training_project, config)))
    (folder, _, job), (_, run, first_job) = started
    ended, first_ended = runs.wait(folder, job, 300), runs.wait(training_project.folder, first_job, 300)
    assert (ended.state, first_ended.state) == ("finished", "finished"), (ended.cause, first_ended.cause)
    assert ended.result == {"elsewhere": launch.ENDED}
    assert [step for step, _ in numbers(training_project, run.id)["train/loss"]] == list(range(1, NUM_STEPS + 1))
    path = training_project.path("runs", run.id, f"step_{NUM_STEPS}.pth")
    assert load_checkpoint(path)["meta"]["ranks"]["world"] == 2 and not list(folder.glob("runs/*/*.pth"))


def put_off(project: Project, run_id: str) -> list[int]:
    with open_db(project.folder) as db:
        return [each.step for each in run_events.listed(db, run_id) if each.kind == "save_put_off"]


def damage_at_random(path: Path) -> None:
    """Any file of a folder of DeepSpeed, and its manifest: refused, or the very same weights, and nothing runs."""
    expected, chance, refused = weights_in(path), random.Random(8), 0
    files = [*sorted(path.iterdir()), manifest_path(path)]
    for read in (weights_in, verified_weights_in):
        for _ in range(75):
            victim = chance.choice(files)
            sound, how = victim.read_bytes(), damage_file(victim, chance)
            with watched() as seen:
                try:
                    assert same(read(path), expected), (victim.name, how)
                except StudioError as error:
                    assert error.message, (victim.name, how)
                    refused += 1
            assert not seen, (victim.name, how)
            victim.write_bytes(sound)
    assert refused > 75


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return read_own(path)["state_dict"]


def verified_weights_in(path: Path) -> dict[str, torch.Tensor]:
    load_checkpoint(path)
    return weights_in(path)


@pytest.mark.slow
def test_samples_that_fail_in_one_rank_of_those_that_compute_them_together_end_the_run(
    training_project: Project, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ZeRO-3 every token takes all ranks: the other one would wait for ever."""
    monkeypatch.setenv(faults.FAULT, "oom@sample:2/1")
    settings = {"record.sample_every_steps": 2, "record.evaluate_every_steps": 0}
    run, job = runs.start_run(training_project, spread(tiny_config, "zero3", **settings))
    *_, ended = jobs.watch(training_project.folder, job.id)
    assert ended.state == "failed" and ended.cause.startswith("Rank 1: The samples of step 2 failed in this process")
    assert "asked for at sample" in ended.cause and "Resume the run." in ended.cause
    assert [step for step, _ in numbers(training_project, run.id)["train/loss"]] == [1, 2]


def test_on_a_full_disk_the_first_rank_is_told_to_stop_by_a_signal(
    training_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its job was: the row can be written by neither."""

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with open_db(training_project.folder) as db:
        row = store.add(db, Job("train", state="running"))
    job = RankContext(training_project.folder, row, training_project.path("jobs", row.id))
    reports = job.job_dir / launch.REPORTS
    reports.mkdir(parents=True)
    monkeypatch.setattr(launch.store, "request", full)
    assert not launch._ask_to_stop(job, "discard", reports)  # it has not begun
    try:
        with job:
            assert job.requests().stop_request == ""
            assert launch._ask_to_stop(job, "discard", reports)
            assert job.requests().stop_request == "discard"
    finally:
        for number, handler in job._handlers.items():
            signal.signal(number, handler)


def dead(number: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"])
    process.wait()
    return process


def test_a_rank_that_the_kernel_ended_for_want_of_memory_is_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "oom_kills", lambda: 0)
    first, second = launch.Started(0, dead(0)), launch.Started(1, dead(signal.SIGKILL))
    assert launch._cause([first, second], tmp_path).startswith("Rank 1 was killed (signal 9): by a person, or")
    monkeypatch.setattr(processes, "kernel_says_oom", lambda pid: pid == second.process.pid)
    assert launch._cause([first, second], tmp_path) == f"Rank 1 {processes.OUT_OF_MEMORY}. The log says more."
    told_to_end = launch.Started(1, dead(signal.SIGTERM))
    assert launch._cause([first, told_to_end], tmp_path).startswith("Rank 1 was ended by signal 15 (SIGTERM).")


@pytest.mark.parametrize(
    ("second", "cause"),
    [("os.kill(os.getpid(), 9)", "Rank 1 was killed"), ("os._exit(3)", "Rank 1 ended with exit code 3")],
)
def test_a_rank_that_was_ended_because_another_was_gone_is_not_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, cause: str
) -> None:
    """The first was in the middle of a long step: it saw nothing, and said nothing before it was ended."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.0)
    programs = ("import time; time.sleep(60)", f"import os; {second}")
    children = [
        launch.Started(rank, subprocess.Popen([sys.executable, "-c", each])) for rank, each in enumerate(programs)
    ]
    children[1].process.wait()
    launch._end(children)
    assert launch._cause(children, tmp_path).startswith(cause)


def test_a_launcher_that_passes_a_signal_on_is_not_the_cause(tmp_path: Path) -> None:
    """As srun and DeepSpeed's launcher do, whose ranks may be on another machine."""
    for code, cause in ((137, "A rank was killed (signal 9)"), (247, "A rank was killed"), (1, "The launcher ended")):
        launcher = launch.Started(-1, subprocess.Popen([sys.executable, "-c", f"import os; os._exit({code})"]))
        launcher.process.wait()
        assert launch._cause([launcher], tmp_path).startswith(cause)


def test_a_rank_whose_file_is_not_there_yet_is_asked_after_later(tmp_path: Path) -> None:
    """Listed and gone: a folder that machines share may show a file before it can be read."""
    target = tmp_path / "later"
    (tmp_path / f"{launch.BEGAN}0.json").symlink_to(target)
    silent = launch.Silent(tmp_path)
    silent.look()
    assert silent.gone == []
    gone = {"rank": 0, "pid": 2**22 + 1, "created": 1.0, "host": socket.gethostname()}
    target.write_text(json.dumps(gone), encoding="utf-8")
    silent.look()
    assert silent.gone == [gone]


@pytest.mark.slow
def test_a_rank_of_a_launcher_that_is_killed_is_named(training_project: Project, tiny_config: Make) -> None:
    """DeepSpeed's tells a number at its end; torchrun not even that."""
    settings = {"train.num_steps": 4000, "record.evaluate_every_steps": 0, "record.save_every_steps": 0}
    config = spread(tiny_config, "zero1", **settings, **{"distributed.launcher": "deepspeed"})
    run, job = runs.start_run(training_project, config)
    wait_for_step(training_project, run.id, job, 2)
    began = training_project.path("jobs", job.id, launch.REPORTS, f"{launch.BEGAN}1.json")
    os.kill(json.loads(began.read_text())["pid"], signal.SIGKILL)
    *_, ended = jobs.watch(training_project.folder, job.id)
    assert ended.state == "failed" and ended.cause == f"Rank 1 {processes.GONE}. The log says more.", ended.cause


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_its_cause_and_fewer_go_on_from_the_weights(
    training_project: Project, tiny_config: Make
) -> None:
    by_time = {"record.save_every_steps": 0, "record.save_every_minutes": 1e-9}  # the first step is, others may be
    settings = {"train.num_steps": 400, "record.evaluate_every_steps": 0, **by_time}
    config = spread(tiny_config, "zero1", **settings)
    run, job = runs.start_run(training_project, config)
    current = wait_for_step(training_project, run.id, job, 5)
    ranks = ranks_of(current.pid)
    assert len(ranks) == 2
    second = next(each for each in ranks if each.environ()["RANK"] == "1")
    os.kill(second.pid, signal.SIGKILL)
    *_, ended = jobs.watch(training_project.folder, job.id)
    assert (ended.state, "Rank 1 was killed (signal 9)" in ended.cause) == ("failed", True), ended.cause
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks)

    job = runs.resume_run(training_project, run.id, "auto", {"processes_per_node": 1})
    saved = wait_for_step(training_project, run.id, job, 8)
    assert saved.live
    jobs.stop(training_project.folder, job.id)
    *_, ended = jobs.watch(training_project.folder, job.id)
    assert ended.state == "stopped" and ended.result["steps"] >= 8
    log = Path(ended.log_path).read_text()
    assert "the optimizer's memory begins anew" in log
    assert load_checkpoint(training_project.path(ended.result["checkpoint"]))["meta"]["ranks"]["world"] == 1
