"""`retune checkpoints` on what XTuner left: looked into, a work folder listed, and told what it lacks."""

import json
from pathlib import Path

from studio.projects import Project
from studio.store import open_db, runs
from tests.cli.conftest import Retune
from tests.foreign.places import FULL, LORA, TINY_LLAMA, ZERO2, copied


def test_a_checkpoint_and_a_work_folder_are_looked_into(retune: Retune, tmp_path: Path) -> None:
    shown = retune("checkpoints", "inspect", LORA, "--tensors")
    assert "internlm2_chat" in shown and "lora_A.weight" in shown
    assert json.loads(retune("checkpoints", "inspect", ZERO2, "--json"))["step"] == 6
    for name, source in (("lora/iter_96.pth", LORA), ("full/iter_96.pth", FULL)):
        copied(source, tmp_path / name)
    listed = retune("checkpoints", "inspect", tmp_path)
    assert "lora/iter_96.pth" in listed and "full/iter_96.pth" in listed and "7.629" in listed
    assert len(json.loads(retune("checkpoints", "inspect", tmp_path, "--json"))) == 2


def test_what_was_converted_is_no_checkpoint_any_more(retune: Retune, tmp_path: Path) -> None:
    assert "is a whole model in Hugging Face's format already" in retune("checkpoints", "inspect", TINY_LLAMA, code=1)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "is an adapter in Hugging Face's format already" in retune("checkpoints", "inspect", tmp_path, code=1)


def test_an_import_names_the_run_that_it_made(retune: Retune, project: Project) -> None:
    assert "needs its base model" in retune("checkpoints", "import", LORA, "-p", project.slug, code=1)
    said = retune("checkpoints", "import", LORA, "--base", TINY_LLAMA, "--name", "Luna", "-p", project.slug)
    assert "iter_96.pth is step 6 of run luna-1" in said and "--continue-from luna-1" in said
    with open_db(project.folder) as db:
        [run] = runs.listed(db)
    assert (run.id, run.state, run.step, run.detail["imported"]["iteration"]) == ("luna-1", "finished", 6, 96)
