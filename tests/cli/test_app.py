"""The command as a whole: help, start-up, exit codes, faults that are not ours."""

import json
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command

from studio.cli import doctor
from studio.cli.app import app
from studio.cli.xtuner import ALIASES
from studio.projects import Project
from tests.cli.conftest import Retune

HEAVY = ("sqlite_utils", "pandas", "pydantic", "tokenizers", "streamlit", "torch")


def commands() -> list[list[str]]:
    """Every command as its words; groups and XTuner's own commands, which explain themselves as there, left out."""
    found, waiting = [], [([], get_command(app))]
    while waiting:
        words, command = waiting.pop()
        children = getattr(command, "commands", None)
        if children:
            waiting += [([*words, name], child) for name, child in children.items() if name not in ("xtuner", *ALIASES)]
        else:
            found.append(words)
    return sorted(found)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_explains_itself_with_an_example(words: list[str], retune: Retune) -> None:
    said = " ".join(retune(*words, "-h").split())
    assert f"Example: retune {words[0]}" in said
    assert said == " ".join(retune(*words, "--help").split())


def test_hyphens_and_underscores_are_one(retune: Retune) -> None:
    assert "Hugging Face folder" in retune("convert", "pth-to-hf", "-h")
    assert "Hugging Face folder" in retune("convert", "pth_to_hf", "-h")
    assert "No such command" in retune("convert", "pth to hf", code=2)


def test_version(retune: Retune) -> None:
    assert retune("--version").strip() == f"retune {metadata.version('retune')}"


def test_help_starts_without_the_heavy_libraries(tmp_path: Path) -> None:
    code = "import sys\nfrom studio.cli.app import app\napp(['--help'], standalone_mode=False)\n"
    code += f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2, "half a second is usual"


def test_a_home_that_is_a_file_is_one_sentence(retune: Retune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "file"
    broken.write_text("not a folder")
    monkeypatch.setenv("RETUNE_HOME", str(broken))
    said = retune("project", "new", "Luna", code=1)
    assert said.startswith("error: ") and str(broken) in said


@pytest.mark.parametrize(
    "words",
    [
        ["export", "gguf", "~no-such-user/x"], ["export", "push", "~no-such-user/x", "me/luna"],
        ["data", "inspect", __file__, "--tokenizer", "~no-such-user/x"], ["config", "import", "~no-such-user/x.py"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_home_that_nobody_has_is_one_sentence(words: list[str], project: Project, retune: Retune) -> None:
    assert "error: " in retune(*words, code=1)


def test_a_pipe_that_closes_early_is_no_fault(project: Project, own_home: Path) -> None:
    command = f"{sys.executable} -m studio.cli.app config show starter_lora | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=100,
        env={**os.environ, "RETUNE_HOME": str(own_home)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def test_models_list_and_a_base_that_is_none(retune: Retune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "none"))
    assert "retune models fetch starter" in retune("models", "list")
    assert json.loads(retune("models", "list", "--json")) == []
    assert "no such folder" in retune("models", "fetch", "/nowhere/at/all", code=1)
    assert "does not name a base model" in retune("models", "fetch", "a b c", code=1)


def fake_engine() -> list[doctor.Finding]:
    return [doctor.Finding("device", True, "cpu")]


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor without the process that asks torch, which has its own test."""
    monkeypatch.setattr(doctor, "_engine", fake_engine)


def test_doctor_is_content_here(retune: Retune) -> None:
    said = retune("doctor")
    assert "device" in said and "bitsandbytes" in said and "FAIL" not in said


def test_doctor_names_a_broken_home(
    retune: Retune, quick_doctor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "file"
    broken.write_text("not a folder")
    monkeypatch.setenv("RETUNE_HOME", str(broken))
    assert "cannot hold a database" in retune("doctor", code=1)


def test_doctor_names_an_unsafe_and_a_missing_package(
    retune: Retune, quick_doctor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "2.9.1+cpu" if name == "torch" else installed(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    said = retune("doctor", code=1)
    assert "torch: 2.9.1+cpu is unsafe" in said and "peft: not installed" in said
    printed = retune("doctor", "--json", code=1)
    findings, _end = json.JSONDecoder().raw_decode(printed, printed.index("["))
    found = {finding["name"]: finding for finding in findings}
    assert not found["torch"]["ok"] and found["device"]["ok"]


def test_doctor_says_why_the_engine_does_not_start(retune: Retune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "training engine: does not start" in retune("doctor", code=1)


def test_an_unforeseen_fault_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only expected faults are made into sentences: hiding a bug would help nobody."""
    from typer.testing import CliRunner

    from studio.cli import show

    monkeypatch.setattr(show, "table", lambda *_: 1 / 0)
    done = CliRunner().invoke(app, ["config", "list"])
    assert isinstance(done.exception, ZeroDivisionError)
