"""Bad input, end to end: a clear message with the next move, nothing lost, and nothing in a file ever runs."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from studio import datasets, jobs, runs
from studio.config.schema import RunConfig
from studio.config.yaml import save_config
from studio.data.formats import Conversation, Message
from studio.errors import CheckpointError, ConfigError, DataError, ModelError, ProjectError
from studio.paths import REPOSITORY, sha256_of
from studio.projects import Project, create_project, list_projects
from studio.store import checkpoints, open_db
from studio.store.jobs import Job
from tests.engine.folders import full_checkpoint, lora_checkpoint, make_base

GOOD_ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
FIVE_MISTAKES = """
name: Not A Slug
method: lorra
modle: {base: starter}
train: {learning_rate: -1, num_steps: ten}
"""


@dataclass(frozen=True)
class Shell:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def retune(own_home: Path) -> Any:
    def run(*words: str) -> Shell:
        done = subprocess.run(
            [sys.executable, "-m", "studio.cli.app", *words],
            capture_output=True, text=True, cwd=REPOSITORY, timeout=180, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        return Shell(done.returncode, done.stdout, done.stderr)

    return run


def refused(shell: Shell, *words: str) -> None:
    """Ended with an error that holds these words, and no Python trace."""
    assert shell.code not in (0, None), shell.out
    text = shell.err + shell.out
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, text


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, the database and logs left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".yaml", ".pth")]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


@pytest.fixture
def filled(project: Project) -> Project:
    """A project with a dataset that must survive whatever is thrown at it."""
    rows = [Conversation((Message("user", f"{n}?"), Message("assistant", f"{n}!")), {}) for n in range(4)]
    datasets.save(project, "identity", rows, kind="import")
    return project


# Data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"messages": [', ["a.json"]),
        ("a.json", b"", ["a.json"]),
        ("a.json", b"[" * 200_000, ["a.json"]),
        ("a.jsonl", b'{"messages": 3}\n', ["row 1"]),
        ("a.jsonl", json.dumps(GOOD_ROW).encode() + b"\nnot json\n", ["2"]),
        ("a.jsonl", b"\xff\xfe\x00\x01" * 50, ["a.jsonl"]),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', ["1"]),
        ("a.jsonl", b"\x80\x04\x95cos\nsystem\n(S'touch canary'\ntR.", ["a.jsonl"]),
    ],
    ids=["cut", "empty", "deep", "shape", "second row", "binary", "half a character", "pickle"],
)
def test_a_wrong_data_file_changes_nothing(
    filled: Project, tmp_path: Path, retune: Any, name: str, content: bytes, words: list[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    before = snapshot(filled.folder)
    with pytest.raises(DataError) as caught:
        datasets.import_file(filled, file, name="identity")
    assert caught.value.hint or len(caught.value.message) > 30
    assert all(word.lower() in str(caught.value).lower() for word in words), str(caught.value)
    refused(
        retune("data", "import", str(file), "--dataset", "identity", "--project", filled.slug), words[0].split()[-1]
    )
    assert snapshot(filled.folder) == before and datasets.get(filled, "identity").num_rows == 4
    assert not list(REPOSITORY.glob("canary")) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/b", "", "A B", "a\0b"])
def test_a_dataset_cannot_be_called_a_path(filled: Project, name: str) -> None:
    with pytest.raises(DataError, match="cannot name a dataset"):
        datasets.save(filled, name, [], kind="import")
    assert snapshot(filled.folder).keys() == {"data/identity.jsonl"}


# Projects


def test_a_project_called_like_a_path_lies_inside(retune: Any, own_home: Path) -> None:
    shell = retune("project", "new", "../../etc")
    assert shell.code == 0, shell.err
    assert [project.slug for project in list_projects()] == ["etc"]
    assert sorted(path.name for path in own_home.iterdir()) == ["projects"]
    refused(retune("project", "show", "../../etc/passwd"), "no project", "etc")
    refused(retune("project", "delete", "../..", "--yes"), "no project")
    refused(retune("project", "new", " "), "name")
    with pytest.raises(ProjectError):
        create_project("\0")


# Configs


def test_a_config_with_five_mistakes_names_them_all_and_starts_nothing(
    filled: Project, retune: Any, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(FIVE_MISTAKES)
    mistakes = ["name", "method", "modle", "train.learning_rate", "train.num_steps", "lora, qlora, full"]
    refused(retune("config", "check", str(path), "--project", filled.slug), "5 problems", *mistakes)
    refused(retune("train", str(path), "--project", filled.slug), "5 problems", *mistakes)
    assert runs.list_runs(filled) == [] and jobs.refresh(filled.folder) == []
    assert list((filled.folder / "runs").iterdir()) == []


def test_a_config_is_data_and_never_runs(filled: Project, retune: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "tag.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']")
    (tmp_path / "code.py").write_text(f"import os\nos.system('touch {canary}')\nmodel = 3\n")
    for name in ("tag.yaml", "code.py"):
        refused(retune("train", str(tmp_path / name), "--project", filled.slug), name)
    assert not canary.exists()


# Base models


@pytest.mark.parametrize("base", ["/nowhere/at/all", "somebody/some-model", "../../etc", "modelscope:x/y", "a b c"])
def test_a_missing_model_is_said_before_anything_is_made(filled: Project, base: str) -> None:
    config = RunConfig.model_validate({"model": {"base": base}, "data": {"sources": {"identity": 1.0}}})
    with pytest.raises(ModelError) as caught:
        runs.start_run(filled, config)
    assert base in str(caught.value) and caught.value.hint
    assert runs.list_runs(filled) == [] and list((filled.folder / "runs").iterdir()) == []


def test_a_dataset_that_is_not_there_is_said_before_anything_is_made(filled: Project, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = RunConfig.model_validate({"model": {"base": str(base)}, "data": {"sources": {"nothing": 1.0}}})
    with pytest.raises(ConfigError, match="no dataset 'nothing'.*there are: identity"):
        runs.start_run(filled, config)
    assert runs.list_runs(filled) == []


# Checkpoints


def registered(project: Project, pth: Path, step: int) -> Path:
    with open_db(project.folder) as db:
        relative = project.relative(pth)
        checkpoints.put(db, checkpoints.Checkpoint("tiny-1", step, relative, "0" * 64, pth.stat().st_size))
    return pth


def converted(project: Project, step: int) -> Job:
    job = runs.start_convert(project, "tiny-1", step)
    *_, done = jobs.watch(project.folder, job.id, interval_seconds=0.1)
    return done


def bomb(path: Path, canary: Path) -> Path:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": {"format": "retune/1", "step": 1}, "state_dict": {}, "x": Bomb()}, path)
    return path


def test_a_pickle_bomb_does_not_go_off(filled: Project, retune: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pth = registered(filled, bomb(filled.path("runs", "tiny-1", "step_1.pth"), canary), 1)
    save_config(pth.with_name("config.yaml"), RunConfig())
    done = converted(filled, 1)
    assert done.state == "failed" and "run code" in done.cause and "safetensors" in done.cause
    words = ["tiny-1", str(pth), str(tmp_path / "out"), "--project", filled.slug]
    refused(retune("convert", "pth_to_hf", *words), "could run code", "safetensors")
    assert not canary.exists() and not (tmp_path / "out").exists() and list((filled.folder / "hf").iterdir()) == []


def test_a_truncated_checkpoint_is_named_and_the_one_before_still_works(filled: Project, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run = filled.path("runs", "tiny-1")
    good = registered(filled, lora_checkpoint(base, run / "step_1.pth", 1), 1)
    cut = registered(filled, lora_checkpoint(base, run / "step_2.pth", 2), 2)
    cut.write_bytes(cut.read_bytes()[:-1000])
    done = converted(filled, 2)
    assert done.state == "failed" and "step_2.pth" in done.cause and "checkpoint" in done.cause
    assert list((filled.folder / "hf").iterdir()) == []
    assert converted(filled, 1).state == "finished"
    assert good.is_file() and runs.is_converted(filled, "tiny-1", 1)


@pytest.mark.parametrize("run_id", ["../../etc", "nobody", ""])
def test_a_run_that_is_not_there(filled: Project, run_id: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"), open_db(filled.folder) as db:
        checkpoints.get(db, run_id, 1)


def test_a_registered_path_cannot_lead_out_of_the_project(filled: Project, tmp_path: Path) -> None:
    outside = bomb(tmp_path / "outside.pth", tmp_path / "canary")
    with open_db(filled.folder) as db:
        checkpoints.put(db, checkpoints.Checkpoint("tiny-1", 1, str(outside), "", 1))
    done = converted(filled, 1)
    assert done.state == "failed" and "outside" in done.cause and not (tmp_path / "canary").exists()


# A full disk


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """For the processes that are started inside, no file can grow beyond this: EFBIG, as ENOSPC on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_converting_leaves_what_was_there(filled: Project, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden_size=256)
    registered(filled, full_checkpoint(base, filled.path("runs", "tiny-1", "step_1.pth"), 1), 1)
    assert converted(filled, 1).state == "finished"
    made = sha256_of(filled.path("hf", "tiny-1-step_1", "model.safetensors"))
    with files_up_to(1_000_000):
        job = runs.start_convert(filled, "tiny-1", 1)
    *_, done = jobs.watch(filled.folder, job.id, interval_seconds=0.1)
    assert done.state == "failed" and "disk" in done.cause and "Free some space" in done.cause, done.cause
    assert sha256_of(filled.path("hf", "tiny-1-step_1", "model.safetensors")) == made
    assert [path.name for path in (filled.folder / "hf").iterdir()] == ["tiny-1-step_1"]


def test_a_full_disk_while_saving_data_leaves_what_was_there(filled: Project, retune: Any, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 4000}, GOOD_ROW["messages"][1]]}
    file = tmp_path / "big.jsonl"
    file.write_text((json.dumps(row) + "\n") * 500)
    before = snapshot(filled.folder)
    with files_up_to(1_000_000):
        shell = retune("data", "import", str(file), "--dataset", "identity", "--project", filled.slug)
    refused(shell, "disk", "Free some space")
    assert snapshot(filled.folder) == before and datasets.get(filled, "identity").num_rows == 4
    assert not list(filled.folder.rglob(".tmp-*"))
