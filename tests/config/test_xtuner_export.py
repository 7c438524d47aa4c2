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
from tests.foreign.places import TINY_LLAMA

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
                "gradient_checkpointing": st.sampled_from([True, False, "auto"]),
                "optimizer": st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit"]),
            }
        ),
        "record": st.fixed_dictionaries(
            {
                "sample_prompts": st.lists(texts, max_size=3),
                "sample_system": texts,
                "save_every_steps": st.integers(0, 999),
                "save_every_minutes": st.floats(0, 99),
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
    text = export_file(config, Path(f"{stem}.py")).text
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


def exported(base: str, **settings: Any) -> str:
    values = {"name": "x", "method": "qlora", "model": {"base": base}, "data": {"sources": {"mine": 1.0}}}
    return export_file(parse_config(values | settings), Path("x.py")).text


def test_a_tokenizer_is_told_what_xtuner_tells_it() -> None:
    """Without them XTuner stops, or trains answers that have no end; each is what XTuner's own configs say.

    The file is text for XTuner, read back without running it: trust_remote_code is a word there, and loads nothing.
    """
    told = {
        "Qwen/Qwen-7B": ["trust_remote_code=True", "eos_token='<|endoftext|>'", "padding_side='right'"],
        "Qwen/Qwen-7B-Chat": ["trust_remote_code=True", "eos_token='<|im_end|>'"],
        "openbmb/MiniCPM-2B-sft-bf16": ["eos_token='</s>'"],
        "THUDM/chatglm3-6b": ["encode_special_tokens=True", "padding_side='left'"],
    }
    for base, lines in told.items():
        part = exported(base).partition("tokenizer = dict(")[2].partition("model = dict(")[0]
        assert all(line in part for line in lines), base
    assert "trust_remote_code" not in exported("meta-llama/Meta-Llama-3-8B")


def test_numbers_have_one_format_in_the_whole_file() -> None:
    in_float32 = exported("a/b", method="lora", model={"base": "a/b", "dtype": "float32"})
    assert "torch_dtype=torch.float32" in in_float32 and "type=OptimWrapper," in in_float32
    in_bfloat16 = exported("a/b", model={"base": "a/b", "dtype": "bfloat16"})
    assert "bnb_4bit_compute_dtype=torch.bfloat16" in in_bfloat16 and "dtype='bfloat16'" in in_bfloat16


def test_each_source_is_loaded_as_xtuner_loads_it() -> None:
    recipes = {
        "moss": {"source": "data/moss.jsonl", "format": "moss_sft"},
        "agent": {"source": "modelscope:damo/MSAgent-Bench", "format": "msagent_react"},
        "chat": {"source": "data/chat.json", "format": "sharegpt"},
    }
    data = {"sources": dict.fromkeys(["moss", "agent", "chat", "mine"], "all"), "recipes": recipes}
    config = parse_config({"name": "x", "method": "lora", "model": {"base": "a/b"}, "data": data})
    found = export_file(config, Path("x.py"))
    assert "type=MOSSSFTDataset,\n    data_file='data/moss.jsonl'" in found.text
    assert (
        "type=process_ms_dataset,\n    dataset=dict(type=MsDataset.load, dataset_name='damo/MSAgent-Bench')"
        in found.text
    )
    assert found.written == {"chat": "x_data/chat.jsonl", "mine": "x_data/mine.jsonl"}  # XTuner has no map for them
    assert import_text(found.text, "x").config == config


def test_what_is_otherwise_in_xtuner_is_said() -> None:
    values = {"name": "x", "model": {"base": "internlm/internlm2-7b"}, "data": {"sources": {"a": 1.0, "b": 2.0}}}
    values |= {"distributed": {"strategy": "deepspeed"}}
    notes = " ".join(export_file(parse_config(values), Path("x.py")).notes)
    assert all(word in notes for word in ("trust_remote_code", "shares", "--deepspeed")) and "bare text" not in notes
    values |= {"model": {"base": "nobody/knows-it"}}
    assert "bare text" in " ".join(export_file(parse_config(values), Path("x.py")).notes)


def test_a_model_that_is_here_gets_the_template_that_writes_as_its_tokenizer() -> None:
    assert "PROMPT_TEMPLATE.internlm2_chat" in exported(str(TINY_LLAMA))


def test_other_tasks_are_not_exported() -> None:
    with pytest.raises(ConfigError, match="dpo has no export"):
        export_text(catalog.preset("internlm2_chat_1_8b_dpo_full"))


def test_what_is_left_to_memory_here_is_on_in_xtuner() -> None:
    assert "use_activation_checkpointing=True" in exported("a/b", train={"gradient_checkpointing": "auto"})
