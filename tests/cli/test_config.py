"""`retune config`: presets, own configs, and every problem at once."""

import json
from pathlib import Path

import pytest

from studio.config.catalog import preset_names
from studio.config.yaml import load_text
from studio.projects import Project, create_project
from tests.cli.conftest import Retune

FIVE_MISTAKES = """
name: Bad Name
method: lorra
model:
  bse: starter
train:
  num_steps: -1
  learning_rate: fast
"""


def test_list_shows_presets_without_a_project(retune: Retune) -> None:
    listed = json.loads(retune("config", "list", "--json"))
    assert [row["config"] for row in listed] == preset_names()


def test_new_keeps_comments_and_applies_settings(retune: Retune, project: Project) -> None:
    retune("config", "new", "starter_lora", "--name", "luna", "--set", "train.learning_rate=3e-4")
    text = (project.folder / "configs" / "luna.yaml").read_text(encoding="utf-8")
    assert "# Half of the rows" in text
    assert load_text(text).train.learning_rate == 3e-4
    assert "luna" in retune("config", "list")
    assert "is there already" in retune("config", "new", "starter_lora", "--name", "luna", code=1)


def test_presets_train_the_base_model_of_their_project(retune: Retune) -> None:
    other = create_project("Other", "owner/name")
    retune("config", "new", "starter_lora", "--project", other.slug)
    text = (other.folder / "configs" / "starter_lora.yaml").read_text(encoding="utf-8")
    assert load_text(text).model.base == "owner/name" and "# Half of the rows" in text
    assert "on owner/name" in retune("config", "check", "starter_full", "--project", other.slug)


def test_new_of_an_unknown_preset_names_those_there_are(retune: Retune, project: Project) -> None:
    assert "starter_qlora" in retune("config", "new", "nope", code=1)
    assert "letters" in retune("config", "new", "starter_lora", "--name", "../../x", code=1)
    assert not list(project.folder.glob("configs/*"))


def test_check_reports_five_mistakes_at_once(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(FIVE_MISTAKES, encoding="utf-8")
    said = retune("config", "check", file, code=1)
    assert "5 problems" in said
    for path in ("name:", "method:", "model.bse:", "train.num_steps:", "train.learning_rate:"):
        assert f"- {path}" in said
    assert "lora, qlora, full" in said and ">= 1" in said


def test_check_of_settings_reports_all_of_them(retune: Retune) -> None:
    said = retune(
        "config", "check", "starter_lora", "--set", "foo", "--set", "train.nope=1", "-s", "lora.rank=0", code=1
    )
    assert "3 problems" in said


def test_check_says_what_keeps_it_from_starting(retune: Retune, project: Project) -> None:
    said = retune("config", "check", "starter_lora")
    assert "is sound" in said and "no dataset 'identity'" in said


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "../../etc/passwd"])
def test_a_config_that_is_not_there(name: str, retune: Retune, project: Project) -> None:
    assert "problem" in retune("config", "check", name, code=1)


@pytest.mark.parametrize("name", preset_names())
def test_show_prints_a_config_that_loads_again(name: str, retune: Retune) -> None:
    assert load_text(retune("config", "show", name)).name == name


def test_show_prefers_the_projects_own(retune: Retune, project: Project) -> None:
    retune("config", "new", "starter_lora", "--set", "lora.rank=3")
    assert load_text(retune("config", "show", "starter_lora")).lora.rank == 3


def test_an_export_to_xtuner_brings_the_projects_rows_along(retune: Retune, project: Project, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Luna."}]}\n')
    retune("data", "import", rows, "--dataset", "mine")
    settings = ["data.sources={mine: 1.0, gone: 2.0}", "model.base=nobody/knows-it"]
    out = tmp_path / "out" / "luna.py"
    said = retune("config", "export", "starter_lora", "--xtuner", out, *(w for s in settings for w in ("--set", s)))
    assert "luna_data/mine.jsonl: 1 rows" in said and "rows of gone" in said and "bare text" in said
    [row] = [json.loads(line) for line in (out.parent / "luna_data" / "mine.jsonl").read_text().splitlines()]
    assert row == {"conversation": [{"system": "", "input": "Who?", "output": "Luna."}]}
    assert "data_files=dict(train='luna_data/mine.jsonl')" in out.read_text(encoding="utf-8")
    assert "is there already" in retune("config", "export", "starter_lora", "--xtuner", out, code=1)
