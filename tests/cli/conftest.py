"""The command line, run in this process; jobs that it starts are processes of their own, as always."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from studio.cli.app import app
from studio.projects import Project, create_project, list_projects
from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]
Retune = Callable[..., str]


def run(*words: object, code: int = 0, answer: str = "") -> str:
    """stdout and stderr of `retune WORDS`; the exit code must be `code`, and nothing may leave as an exception."""
    done = CliRunner().invoke(app, [str(word) for word in words], input=answer)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


SETTINGS = (
    "name=tiny", "train.num_steps=4", "train.warmup_steps=1", "train.micro_batch_size=1", "data.max_length=256",
    "data.sources={identity: 1}", "data.valid_share=0", "record.save_every_steps=2", "record.save_every_minutes=0",
    "record.sample_max_new_tokens=2",
)  # fmt: skip


def settings(model: Path, *more: str) -> list[str]:
    pairs = (f"model.base={model}", *SETTINGS, *more)
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with a project whose run `tiny-1` has ended, and what `retune train` said."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETUNE_HOME", str(home))
        create_project("Tiny", base=str(tiny_model))
        run("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 12)
        said = run("train", "starter_lora", *settings(tiny_model))
    (home / "said").write_text(said, encoding="utf-8")
    return home


@pytest.fixture
def trained(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("RETUNE_HOME", str(trained_home))
    return list_projects()[0]


@pytest.fixture
def retune() -> Retune:
    return run
