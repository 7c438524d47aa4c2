"""`retune list-cfg` and `copy-cfg`, and built-in names wherever a config is asked for."""

import json
from pathlib import Path

import pytest

from studio.config.yaml import load_config
from studio.projects import Project
from tests.cli.conftest import Retune


def test_list_cfg(retune: Retune) -> None:
    listed = retune("list-cfg", "-p", "InternLM2_1_8b").split()
    assert listed == [
        "internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_full_custom_pretrain_e1", "internlm2_1_8b_qlora_alpaca_e3"
    ]  # fmt: skip
    assert len(json.loads(retune("list-cfg", "--json"))) == 584
    assert "deepspeed_zero2_offload" in retune("list-cfg", "-p", "zero2")
    assert "No built-in config" in retune("list-cfg", "-p", "nowhere")


def test_copy_cfg(retune: Retune, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    retune("copy-cfg", "internlm2_1_8b_qlora_alpaca_e3", str(folder))
    copy = folder / "internlm2_1_8b_qlora_alpaca_e3_copy.yaml"
    assert load_config(copy).model.base == "internlm/internlm2-1_8b"
    assert "is there already" in retune("copy-cfg", "internlm2_1_8b_qlora_alpaca_e3", str(folder), code=1)
    retune("copy-cfg", "deepspeed_zero3", str(folder))
    assert json.loads((folder / "deepspeed_zero3_copy.json").read_text())["zero_optimization"]["stage"] == 3


def test_copy_cfg_for_a_base_of_ones_own(retune: Retune, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "internlm2"}', encoding="utf-8")
    retune("copy-cfg", "qlora_alpaca_e3", str(tmp_path), "--base", str(model))
    config = load_config(tmp_path / "qlora_alpaca_e3_copy.yaml")
    assert config.model.base == str(model.resolve()) and config.data.template == "internlm2_chat"
    retune("copy-cfg", "internlm2_1_8b_qlora_alpaca_e3", str(tmp_path), "--base", str(model))
    assert load_config(tmp_path / "internlm2_1_8b_qlora_alpaca_e3_copy.yaml").data.template == "default"
    (model / "config.json").write_text("[]", encoding="utf-8")
    assert "holds no settings" in retune("copy-cfg", "lora_alpaca_e3", str(tmp_path), "--base", str(model), code=1)


@pytest.mark.parametrize("name", ["internlm2_1_8b_qlora_alpaca_e9_tail", "alpaca_e3", "deepspeed_zero9", ""])
def test_other_names_are_refused(retune: Retune, tmp_path: Path, name: str) -> None:
    assert "no built-in config" in retune("copy-cfg", name, str(tmp_path), code=1)
    assert not list(tmp_path.glob("*_copy*"))


def test_a_name_with_a_slip_is_told_the_nearest(retune: Retune, tmp_path: Path) -> None:
    said = retune("copy-cfg", "internlm2_1_8b_qlora_alpace_e3", str(tmp_path), code=1)
    assert "(allowed: internlm2_1_8b_qlora_alpaca_e3" in said


def test_built_in_names_are_configs(retune: Retune, project: Project) -> None:
    assert "pack: sequence" in retune("config", "show", "qwen3_8b_lora_oasst1_e2")
    checked = retune("config", "check", "internlm2_chat_1_8b_dpo_full", "--project", project.slug)
    assert "learns from pairs of answers" in checked and "retune data fetch" in checked
    retune("config", "new", "internlm2_1_8b_qlora_alpaca_e3", "--project", project.slug)
    assert load_config(project.path("configs", "internlm2_1_8b_qlora_alpaca_e3.yaml")).lora.rank == 64


def test_what_comes_later_is_refused_before_anything_is_made(retune: Retune, project: Project) -> None:
    refused = retune("train", "internlm2_chat_1_8b_reward_full_ultrafeedback", "--project", project.slug, code=1)
    assert "trains a reward model on pairs of answers" in refused and not list(project.path("runs").glob("*"))


def test_data_fetch_makes_what_a_config_says_where_to_find(retune: Retune, project: Project, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"name: mine\ndata:\n  sources: {{mine: all}}\n"
        f"  recipes: {{mine: {{source: '{tmp_path / 'rows.json'}', format: alpaca}}}}\n"
    )
    said = retune("config", "check", str(config), "--project", project.slug)
    assert "'mine' is not in this project yet" in said and "retune data fetch mine" in said
    assert "mine: 12 rows" in retune("data", "fetch", str(config), "--project", project.slug)
    assert "has all datasets" in retune("data", "fetch", str(config), "--project", project.slug)
    own = retune("config", "check", "qwen_7b_chat_qlora_custom_sft_e1", "--project", project.slug)
    assert "data.recipes.own.source" in own


def test_import_and_export_of_python_configs(retune: Retune, project: Project, tmp_path: Path) -> None:
    tutorial = tmp_path / "tutorial.py"
    tutorial.write_text((Path(__file__).parents[1] / "config/fixtures/tutorial.py.txt").read_text("utf-8"), "utf-8")
    out = tmp_path / "tutorial.yaml"
    assert "Not taken over" not in retune("config", "import", str(tutorial), "--out", str(out))
    assert load_config(out).data.max_length == 1024
    assert "is there already" in retune("config", "import", str(tutorial), "--out", str(out), code=1)
    retune("config", "export", str(out), "--xtuner", str(tmp_path / "back.py"))
    retune("config", "import", str(tmp_path / "back.py"), "--project", project.slug)
    assert load_config(project.path("configs", "tutorial.yaml")) == load_config(out)
    assert "'/root/ft/model' is not a complete model" in retune("train", str(tutorial), code=1)
    tutorial.write_text(tutorial.read_text("utf-8").replace("betas = (0.9, 0.999)", "betas = mine()"), "utf-8")
    refused = retune("train", str(tutorial), code=1)
    assert "mine(): a call, which would have to be run" in refused and "retune config import" in refused
    assert "Not taken over" in retune("config", "import", str(tutorial), "--out", str(out), "--force")
