"""`retune train`, `runs`, `checkpoints` and `convert` on a tiny model: real processes, a few steps."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.cli import follow
from studio.projects import Project, create_project
from studio.store import metrics, open_db
from studio.store.jobs import Job
from tests.cli.conftest import Retune, settings


def test_train_shows_progress_numbers_and_the_next_move(trained: Project, trained_home: Path) -> None:
    said = (trained_home / "said").read_text(encoding="utf-8")
    assert "tiny-1 finished at step 4/4." in said
    assert "train/loss" in said and "4/4 steps" in said
    assert "step_4.pth" in said and "retune evaluate tiny-1" in said


def test_two_losses_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path))
    project = create_project("Luna")
    with open_db(project.folder) as db:
        metrics.record(db, "luna-1", 2, {"train/loss": 2.0, "valid/loss": 3.0, "train/learning_rate": 1e-4})
    told = follow._newest_numbers(project.folder, Job("train", run_id="luna-1"))
    assert told == "train/loss 2  valid/loss 3  learning rate 0.0001"


def test_an_sbatch_file_asks_for_gpus_unless_they_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retune: Retune
) -> None:
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path))
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    project, words = create_project("Luna"), ("train", "starter_lora", "--launcher", "slurm", "--print-sbatch")
    assert "#SBATCH --gres=gpu:2" in retune(*words)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "#SBATCH --gres" not in retune(*words)
    assert "export CUDA_VISIBLE_DEVICES=" in project.path("configs", "starter_lora_slurm.sbatch").read_text()


def test_runs_list_show_and_log(trained: Project, retune: Retune) -> None:
    (listed,) = json.loads(retune("runs", "list", "--json"))
    assert (listed["id"], listed["state"], listed["step"]) == ("tiny-1", "finished", 4)
    assert "finished" in retune("runs", "list")
    shown = json.loads(retune("runs", "show", "tiny-1", "--json"))
    assert shown["metrics"]["train/loss"] > 0
    assert [checkpoint["step"] for checkpoint in shown["checkpoints"]] == [4, 2]
    assert {sample["prompt"] for sample in shown["samples"]} >= {"Who are you?"}
    assert "step_4.pth" in retune("runs", "show", "tiny-1")
    assert "step 4/4" in retune("runs", "log", "tiny-1")


def test_what_is_not_there_or_not_live_is_said(trained: Project, retune: Retune) -> None:
    for words in (["show"], ["log"], ["stop"], ["save"], ["resume"]):
        said = retune("runs", *words, "nope-1", code=1)
        assert "no run 'nope-1'" in said and "tiny-1" in said
    for words in (["stop"], ["stop", "--kill"], ["save"], ["sample"]):
        assert "is finished" in retune("runs", *words, "tiny-1", code=1)
    assert "no checkpoint" in retune("train", "tiny-1", "--resume", "step_3.pth", code=1)
    other = trained.path("runs", "tiny-2", "step_2.pth")
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(trained.path("runs", "tiny-1", "step_2.pth").read_bytes())
    assert "no checkpoint of run tiny-1" in retune("train", "tiny-1", "--resume", other, code=1)
    shutil.rmtree(other.parent)
    assert "keeps the config" in retune("train", "tiny-1", "--resume", "auto", "--set", "train.seed=1", code=1)


def test_a_resume_from_an_earlier_checkpoint_ends_with_the_same_numbers(trained: Project, retune: Retune) -> None:
    before = json.loads(retune("runs", "show", "tiny-1", "--json"))["metrics"]
    said = retune("train", "tiny", "--resume", "step_2.pth")
    assert "finished at step 4/4" in said
    assert "resuming from step_2.pth" in retune("runs", "log", "tiny-1")
    after = json.loads(retune("runs", "show", "tiny-1", "--json"))["metrics"]
    assert after["train/loss"] == before["train/loss"]


def test_checkpoints_list_and_verify_a_flipped_bit(trained: Project, retune: Retune) -> None:
    assert len(json.loads(retune("checkpoints", "list", "tiny-1", "--json"))) == 2
    assert "is what was saved" in retune("checkpoints", "verify", "tiny-1", "--step", 2)
    file = trained.path("runs", "tiny-1", "step_2.pth")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "sha256 differs" in retune("checkpoints", "verify", "tiny-1", "--step", 2, code=1)
    assert "no checkpoint at step 9" in retune("checkpoints", "verify", "tiny-1", "--step", 9, code=1)
    retune("checkpoints", "delete", "tiny-1", "--step", 2, "--yes")
    assert not file.exists()


def test_convert_and_merge(trained: Project, retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    retune("convert", "pth-to-hf", "tiny-1", "step_4.pth", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "Passed: " in retune("convert", "merge", tiny_model, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_convert_with_a_config_file_works_in_any_folder(
    trained: Project, retune: Retune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = trained.path("runs", "tiny-1", "config.yaml")
    retune("convert", "pth_to_hf", config, trained.path("runs", "tiny-1", "step_4.pth"), "here", "--fp32")
    assert (tmp_path / "here" / "adapter_model.safetensors").is_file()


def test_convert_of_a_truncated_or_missing_checkpoint(trained: Project, retune: Retune, tmp_path: Path) -> None:
    assert "no checkpoint" in retune("convert", "pth_to_hf", "tiny-1", tmp_path / "no.pth", tmp_path / "x", code=1)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(trained.path("runs", "tiny-1", "step_4.pth").read_bytes()[:5000])
    said = retune("convert", "pth_to_hf", "tiny-1", broken, tmp_path / "x", code=1)
    assert "broken.pth" in said and not (tmp_path / "x").exists()


def test_train_refuses_before_anything_is_made(retune: Retune, project: Project, tmp_path: Path) -> None:
    assert "not a complete model" in retune("train", "starter_lora", "--set", f"model.base={tmp_path}", code=1)
    assert "5 problems" in retune(
        "train", "starter_lora", "--set", "method=x", "--set", "lora.rank=0", "--set", "train.seed=-1",
        "--set", "record.keep_last=0", "--set", "nope=1", code=1,
    )  # fmt: skip
    assert "No runs yet" in retune("runs", "list")


def test_train_names_the_dataset_that_is_missing(retune: Retune, project: Project, tiny_model: Path) -> None:
    said = retune("train", "starter_lora", *settings(tiny_model), code=1)
    assert "no dataset 'identity'" in said
    assert "No runs yet" in retune("runs", "list")


def test_stop_saves_and_resume_goes_on(retune: Retune, project: Project, tiny_model: Path) -> None:
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 12)
    more = ("train.num_steps=100000", "record.save_every_steps=0", "record.evaluate_every_steps=0")
    said = retune("train", "starter_lora", "--detach", *settings(tiny_model, *more))
    assert "goes on by itself" in said
    wait_for_step(retune, 2)
    assert "is running" in retune("runs", "resume", "tiny-1", code=1)
    retune("runs", "stop", "tiny-1")
    shown = wait_for_state(retune, "stopped")
    assert [checkpoint["step"] for checkpoint in shown["checkpoints"]] == [shown["run"]["step"]]
    retune("runs", "resume", "tiny-1", "--detach")
    wait_for_step(retune, shown["run"]["step"] + 1)
    retune("runs", "stop", "tiny-1", "--kill")
    assert wait_for_state(retune, "stopped")["run"]["cause"].startswith("Killed on request")


def wait(done: Callable[[], bool], timeout_seconds: float = 240) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def wait_for_step(retune: Retune, step: int) -> None:
    wait(lambda: show(retune)["run"]["step"] >= step)


def wait_for_state(retune: Retune, state: str) -> dict:
    wait(lambda: show(retune)["run"]["state"] == state)
    return show(retune)


def show(retune: Retune) -> dict:
    shown = json.loads(retune("runs", "show", "tiny-1", "--json"))
    assert shown["run"]["state"] not in ("failed", "lost"), shown["run"]["cause"]
    return shown
