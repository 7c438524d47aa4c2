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


def test_built_in_names_are_configs(retune: Retune, project: Project) -> None:
    assert "pack: sequence" in retune("config", "show", "qwen3_8b_lora_oasst1_e2")
    checked = retune("config", "check", "internlm2_chat_1_8b_dpo_full", "--project", project.slug)
    assert "learns from pairs of answers" in checked and "retune data fetch" in checked
    retune("config", "new", "internlm2_1_8b_qlora_alpaca_e3", "--project", project.slug)
    assert load_config(project.path("configs", "internlm2_1_8b_qlora_alpaca_e3.yaml")).lora.rank == 64
