"""XTuner's 576 configs from tables: every name, every hyper-parameter, and names that the grammar makes beside them."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from studio.config import catalog
from studio.config.catalog.base_models import FAMILIES, MODELS
from studio.config.catalog.compose import config_of, converted
from studio.config.catalog.deepspeed import deepspeed_preset
from studio.config.catalog.grid import METHODS
from studio.config.catalog.recipes import RECIPES, system_text
from studio.config.schema import parse_config
from studio.config.yaml import load_text
from studio.data.formats import ALL_FORMATS
from studio.errors import ConfigError

# What the 576 configs of XTuner 0.1.23 hold, one line each. Made from the wheel on PyPI (xtuner 0.1.23,
# xtuner/configs/**/*.py) by evaluating each file with every import replaced by a name: no code of ours read them.
TABLE = json.loads((Path(__file__).parent / "xtuner_0_1_23.json").read_text(encoding="utf-8"))
XTUNER: dict[str, dict[str, Any]] = {
    name: dict(zip(TABLE["columns"], row, strict=True)) for name, row in TABLE["rows"].items()
}
# Where XTuner's file leaves the base open, names a folder of its makers, or weights in Meta's own layout.
OTHER_BASE = {
    "internlm_7b_full_intern_repo_dataset_template": "internlm/internlm-7b",
    "mistral_7b_w_untokenized_dataset": "mistralai/Mistral-7B-v0.1",
    **{name: "meta-llama/Llama-2-7b-hf" for name in XTUNER if name.startswith("llama2_7b_full_alpaca_enzh_")},
}
PLAIN = {
    "learning_rate": "learning_rate", "weight_decay": "weight_decay", "max_norm": "max_norm", "epochs": "epochs",
    "iterations": "iterations", "batch": "batch", "accumulation": "accumulation", "max_length": "max_length",
    "sequence_parallel": "sequence_parallel", "save_every": "save_every", "keep": "keep", "final_share": "final_ratio",
    "sample_every": "sample_every", "max_new_tokens": "max_new_tokens", "warmup_share": "warmup_ratio",
}  # fmt: skip


@pytest.mark.parametrize("model", sorted({entry.line.model for entry in catalog.built_in().values()}))
def test_its_configs_have_the_hyper_parameters_that_xtuners_have(model: str) -> None:
    names = [name for name, entry in catalog.built_in().items() if entry.line.model == model]
    for name in names:
        _compare(name)


def _compare(name: str) -> None:
    theirs, entry = XTUNER[name], catalog.entry(name)
    ours = entry.terms
    assert entry.base == OTHER_BASE.get(name, theirs["base"])
    assert entry.method == theirs["method"]
    for column, term in PLAIN.items():
        if theirs[column] is not None or column in ("epochs", "iterations"):
            assert getattr(ours, term) == theirs[column], (name, column)
    if theirs["lora"] is not None:
        assert [ours.rank, ours.alpha, ours.dropout, list(ours.targets)] == theirs["lora"]
    assert list(ours.betas) == theirs["betas"] or theirs["betas"] is None
    # InternEvo's data is packed by its reader, not by the option
    assert ours.pack == theirs["pack"] or theirs["data"][0][0] == "OWN" and ours.pack
    prompts = RECIPES_PROMPTS[theirs["prompts"]]
    assert ours.prompts == prompts
    assert ours.system.replace(_bot(ours.system), "{bot_name}") == system_text(theirs["system"]) or not theirs["system"]
    assert ours.template == (theirs["template"] or ours.template)
    assert [_source(source) for source in ours.sources] == [tuple(row) for row in _data(theirs, ours)]


def _bot(system: str) -> str:
    """The assistant's name in the one system text that has one."""
    found = [each for each in ("Baichuan", "InternLM", "Llama2", "Llama", "Qwen") if f"name is {each}." in system]
    return found[0] if found else "{bot_name}"


def _source(source: Any) -> tuple[str, str, int, str]:
    place = "OWN" if "path/to" in source.source else source.source
    return place, source.format, source.rows, source.subset


def _data(theirs: dict[str, Any], ours: Any) -> list[list[Any]]:
    """XTuner's datasets; where its file names no map (rows are in its own layout, or a class reads them), ours."""
    assert len(theirs["data"]) == len(ours.sources)
    return [
        [place, map_name or source.format, rows, subset]
        for (place, map_name, rows, subset), source in zip(theirs["data"], ours.sources, strict=True)
    ]


RECIPES_PROMPTS = {
    "": (),
    **{recipe.prompts: recipe.asked() for recipe in RECIPES.values() if recipe.prompts},
}


def test_the_names_are_xtuners() -> None:
    assert set(catalog.built_in()) == set(XTUNER) and len(XTUNER) == 576
    listed = catalog.listed()
    assert len(listed) == 576 + 5 + 3 and listed == sorted(listed)
    assert catalog.listed("INTERNLM2_1_8b") == [
        "internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_full_custom_pretrain_e1", "internlm2_1_8b_qlora_alpaca_e3"
    ]  # fmt: skip


@pytest.mark.slow
def test_every_name_is_copied_and_validates() -> None:
    for name, entry in catalog.built_in().items():
        text = catalog.entry_text(entry)
        # CSafeLoader is yaml.safe_load in C: it makes plain values only, and 584 texts are slow without it.
        assert parse_config(yaml.load(text, yaml.CSafeLoader), name) == config_of(entry), name


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_copy_reads_back_and_says_what_it_comes_from(recipe: str) -> None:
    entry = next(entry for entry in catalog.built_in().values() if entry.line.recipe == recipe)
    text = catalog.preset_text(entry.name)
    assert load_text(text, entry.name) == config_of(entry)
    assert text.startswith(f"# {entry.name}: as in XTuner 0.1.23.") and f"of the data {recipe}" in text
    assert all(f"NOT IN RETUNE YET: {each}" in text for each in entry.missing.splitlines())
    assert ("NOT IN RETUNE YET" in text) == bool(entry.missing)
    for source in entry.terms.sources:
        assert not source.format or source.format in ALL_FORMATS


def test_iterations_become_steps_with_the_arithmetic_shown() -> None:
    config = catalog.preset("internlm2_7b_qlora_colorist_e5")
    assert (config.record.save_every_steps, config.record.sample_every_steps) == (31, 12)
    text = catalog.preset_text("internlm2_7b_qlora_colorist_e5")
    assert "XTuner: 500 micro-batches; 500 / 16 in a step = 31.25, so 31" in text
    assert "XTuner: 200 micro-batches; 200 / 16 in a step = 12.5, so 12" in text
    split = catalog.preset("yi_34b_200k_full_alpaca_enzh_128k_sp8")
    assert split.train.gradient_accumulation_steps == 1 and "8 GPUs" in catalog.entry(split.name).missing


def test_what_cannot_be_trained_yet_says_so() -> None:
    missing = {task: 0 for task in ("sft", "dpo", "orpo", "reward", "vision")}
    for entry in catalog.built_in().values():
        missing[entry.line.task] += 1
        assert entry.line.task == "sft" or "comes later" in entry.missing, entry.name
        assert config_of(entry).task == entry.line.task
    assert missing == {"sft": 505, "dpo": 7, "orpo": 5, "reward": 5, "vision": 54}


def test_the_grammar_composes_for_every_model_of_the_table() -> None:
    for model, method in product(MODELS, METHODS):
        entry = catalog.entry(f"{model}_{method}_oasst1_512_e7")
        config = config_of(entry)
        assert (config.method, config.train.num_epochs, config.data.max_length) == (method, 7, 512)
        assert config.model.base == MODELS[model].hub_id and config.data.sources == {"oasst1": "all"}
        assert config.train.learning_rate == entry.terms.learning_rate


@pytest.mark.parametrize(
    "name", ["", "qwen3_8b", "qwen3_8b_qlora_alpaca", "qwen3_8b_qlora_nothing_e3", "qwen3_8b_qlora_alpaca_e0",
             "qwen3_8b_qlora_alpaca_e99999", "qwen3_8b_dora_alpaca_e3", "qwen3_9b_qlora_alpaca_e3", "../etc/passwd",
             "qwen3_8b_qlora_alpaca_e3_tail", "deepspeed_zero2"],
)  # fmt: skip
def test_other_names_are_refused_with_what_is_near(name: str) -> None:
    with pytest.raises(ConfigError):
        catalog.preset_text(name)


def test_a_model_of_ones_own() -> None:
    own = catalog.on_base("qlora_alpaca_zh_e2", "/models/mine")
    config = config_of(own)
    assert (config.name, config.model.base, config.data.template) == ("qlora_alpaca_zh_e2", "/models/mine", "")
    copied = config_of(catalog.on_base("internlm2_1_8b_qlora_alpaca_e3", "/root/ft/model"))
    assert copied.model.base == "/root/ft/model" and copied.data.template == "default"
    with pytest.raises(ConfigError):
        catalog.on_base("nothing_like_it", "/models/mine")


@pytest.mark.parametrize(("key", "billions"), [
    ("internlm2_chat_1_8b", 1.889), ("internlm2_7b", 7.738), ("llama3_8b", 8.03), ("llama2_70b", 68.98),
    ("qwen2_5_0_5b_instruct", 0.494), ("qwen2_5_7b_instruct", 7.616), ("qwen3_8b", 8.19), ("gemma2_9b_it", 9.24),
    ("phi3_mini_4k_instruct", 3.821), ("yi_34b", 34.39), ("baichuan2_13b_chat", 13.9), ("starcoder", 15.5),
])  # fmt: skip
def test_sizes_are_those_that_the_makers_publish(key: str, billions: float) -> None:
    assert MODELS[key].shape.billions == pytest.approx(billions, rel=0.01)


def test_every_model_has_a_family() -> None:
    assert {model.family for model in MODELS.values()} == set(FAMILIES)
    assert MODELS["internlm2_5_chat_7b"].family == "internlm2_5" and MODELS["qwen_1_8b"].family == "qwen"


def test_deepspeed_presets() -> None:
    stages = {name: deepspeed_preset(name)["zero_optimization"] for name in catalog.DEEPSPEED_NAMES}
    assert [stages[name]["stage"] for name in sorted(stages)] == [1, 2, 2, 3, 3]
    assert (
        "offload_optimizer" in stages["deepspeed_zero2_offload"]
        and "offload_param" in stages["deepspeed_zero3_offload"]
    )
    with pytest.raises(ConfigError):
        deepspeed_preset("deepspeed_zero4")


def test_the_remarks_name_settings_that_are_there() -> None:
    for entry in list(catalog.built_in().values())[::40]:
        found = converted(entry)
        for path in found.remarks:
            value: Any = found.values
            for key in path.split("."):
                assert key in value, (entry.name, path)
                value = value[key]
