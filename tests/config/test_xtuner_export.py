"""What is exported to XTuner reads back as it was, whatever the config, and is a config that XTuner takes."""

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.config import catalog
from studio.config.schema import parse_config
from studio.config.xtuner.exporting import export_file, export_text
from studio.config.xtuner.importing import import_text
from studio.errors import ConfigError

slugs = st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,20}\Z")
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)
portions = st.one_of(st.floats(0.01, 9), st.just("all"), st.fixed_dictionaries({"rows": st.integers(1, 9999)}))
recipes = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["hf:a/b", "modelscope:a/b", "data/a.json", "/tmp/a b.jsonl", "hf:tatsu-lab/alpaca"]),
        "format": st.sampled_from(["", "alpaca", "messages", "crime_kg_assitan", "xtuner", "moss_sft", "pretrain"]),
        "split": st.sampled_from(["train", "test"]),
        "subset": st.sampled_from(["", "finetune"]),
    }
)
configs = st.fixed_dictionaries(
    {
        "name": slugs,
        "method": st.sampled_from(["lora", "qlora", "full"]),
        "model": st.fixed_dictionaries(
            {
                "base": st.one_of(texts.filter(bool), st.sampled_from(["Qwen/Qwen-7B", "modelscope:Qwen/Qwen-7B"])),
                "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
                "continue_from": st.sampled_from(["", "work_dirs/iter_96.pth"]),
            }
        ),
        "lora": st.fixed_dictionaries(
            {
                "rank": st.integers(1, 99),
                "target_modules": st.sampled_from(["all-linear", "q_proj,v_proj"]),
                "dora": st.booleans(),
                "rslora": st.booleans(),
            }  # fmt: skip
        ),
        "data": st.fixed_dictionaries(
            {
                "sources": st.dictionaries(slugs, portions, min_size=1, max_size=3),
                "recipes": st.dictionaries(slugs, recipes, max_size=2),
                "pack": st.sampled_from(["none", "sequence", "tree"]),
                "template": st.sampled_from(["", "none", "default", "internlm2_chat"]),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-9, 1),
                "num_steps": st.one_of(st.none(), st.integers(6, 10**6)),
                "num_epochs": st.floats(0.1, 900),
                "gradient_accumulation_steps": st.integers(1, 64),
                "schedule": st.sampled_from(["cosine", "linear", "constant"]),
                "warmup_ratio": st.one_of(st.none(), st.floats(0, 0.5)),
                "warmup_steps": st.integers(0, 5),
                "max_grad_norm": st.sampled_from([0.0, 1.0, 0.3]),
                "final_learning_rate_ratio": st.floats(0, 1),
                "optimizer": st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit"]),
            }
        ),
        "record": st.fixed_dictionaries(
            {
                "sample_prompts": st.lists(texts, max_size=3),
                "sample_system": texts,
                "save_every_steps": st.integers(0, 999),
                "sample_every_steps": st.integers(0, 99),
                "keep_last": st.integers(1, 1000),
            }
        ),
    }
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=configs, stem=slugs)
def test_import_of_export_is_the_same(values: dict[str, Any], stem: str) -> None:
    values["data"]["recipes"] = {k: v for k, v in values["data"]["recipes"].items() if k in values["data"]["sources"]}
    config = parse_config(values)
    text = export_file(config, Path(f"{stem}.py"))
    ast.parse(text)
    assert import_text(text, stem).config == config


@pytest.mark.parametrize("name", ["internlm2_1_8b_qlora_alpaca_e3", "qwen_7b_qlora_alpaca_enzh_oasst1_e3",
                                  "llama2_7b_qlora_medical_e1", "llama3_8b_full_alpaca_e3"])  # fmt: skip
def test_a_built_in_config_needs_no_words_of_ours(name: str) -> None:
    text = export_text(catalog.preset(name))
    assert "retune = {" not in text
    assert import_text(text, name).config == catalog.preset(name)


def test_edits_of_the_exported_file_count() -> None:
    config = catalog.preset("internlm2_1_8b_qlora_alpaca_e3")
    text = export_text(config).replace("lr = 0.0002", "lr = 1e-4").replace("max_epochs=3.0", "max_epochs=5")
    changed = import_text(text, config.name).config
    assert (changed.train.learning_rate, changed.train.num_epochs) == (1e-4, 5)


def test_other_tasks_are_not_exported() -> None:
    with pytest.raises(ConfigError, match="dpo has no export"):
        export_text(catalog.preset("internlm2_chat_1_8b_dpo_full"))
