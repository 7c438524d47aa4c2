"""Which built-in configs there are: XTuner 0.1.23's 576, from base models, methods and recipes; and what deviates.

A name is `{model}_{method}_{recipe}_e{epochs}` with a tail on some. Names that do not follow this are at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from studio.config.catalog.recipes import ALPACA, ALPACA_ZH, OWN, RECIPES

METHODS = ("qlora", "lora", "full")


@dataclass(frozen=True)
class Line:
    """A built-in config as parts. `terms` are its own deviations, `missing` what Retune cannot do of it, `notes` what
    else is otherwise here. `base` is set where the name's model is not the one that it trains."""

    name: str
    model: str
    method: str
    recipe: str
    task: str = "sft"
    terms: dict[str, Any] = field(default_factory=dict)
    missing: str = ""
    notes: tuple[str, ...] = ()
    base: str = ""


# Sets of recipes that several models have.
SHORT = ("alpaca", "code_alpaca", "lawyer", "oasst1", "oasst1_512")
BILINGUAL = ("alpaca", "alpaca_enzh", "alpaca_enzh_oasst1", "alpaca_zh")
BASE_SHORT = (*SHORT, "arxiv_gentitle", "colorist", "sql")
CHAT = (*SHORT, *BILINGUAL[1:], "open_platypus")
BASE = (*CHAT, "arxiv_gentitle", "colorist", "sql")
ALL = (*BASE, "medical", "openorca", "tiny_codes")
MOSS = ("moss_sft_all", "moss_sft_all_e2_gpu8", "moss_sft_plugins")
AGENT = ("msagent_react_e3_gpu8",)
CODE_AND = (*BILINGUAL, "code_alpaca")
SFT, PRETRAIN, LONG = ("custom_sft",), ("custom_pretrain",), ("finetune_custom_dataset",)
ALPACA_ONLY = ("alpaca",)

# model -> {method: recipes}; a recipe stands for its usual number of epochs, or says another one (alpaca_e5)
GRID: dict[str, dict[str, tuple[str, ...]]] = {
    "baichuan_7b": {"qlora": (*ALL, *MOSS, *SFT)},
    "baichuan_13b_base": {"qlora": (*ALL, *MOSS)},
    "baichuan_13b_chat": {"qlora": (*ALL, *SFT)},
    "baichuan2_7b_base": {"qlora": BASE, "full": PRETRAIN},
    "baichuan2_7b_chat": {"qlora": (*CHAT, *SFT)},
    "baichuan2_13b_base": {"qlora": BASE, "full": PRETRAIN},
    "baichuan2_13b_chat": {"qlora": (*CHAT, *SFT)},
    "chatglm2_6b": {"qlora": (*ALL, *SFT), "full": PRETRAIN},
    "chatglm3_6b": {"qlora": (*ALL, *SFT), "full": PRETRAIN},
    "chatglm3_6b_base": {"qlora": ALL},
    "deepseek_coder_6_7b_base": {"qlora": ("code_alpaca",)},
    "deepseekcoder_6_7b_instruct": {"qlora": ("code_alpaca", *SFT)},
    "deepseek_moe_16b_base": {"qlora": ("oasst1",), "full": ("oasst1", *PRETRAIN)},
    "deepseek_moe_16b_chat": {"qlora": ("oasst1", *SFT), "full": ("oasst1",)},
    "deepseek_v2_chat": {"full": ALPACA_ONLY},
    "deepseek_v2_lite_chat": {"full": (*ALPACA_ONLY, "alpaca_e3_32k_varlen")},
    "gemma_2b": {"qlora": (*ALPACA_ONLY, *SFT), "full": (*ALPACA_ONLY, *PRETRAIN)},
    "gemma_2b_it": {"qlora": (*ALPACA_ONLY, *SFT), "full": ALPACA_ONLY},
    "gemma_7b": {"qlora": (*ALPACA_ONLY, *SFT), "full": (*ALPACA_ONLY, *PRETRAIN)},
    "gemma_7b_it": {"qlora": (*ALPACA_ONLY, *SFT), "full": ALPACA_ONLY},
    "internlm_7b": {
        "qlora": (*ALL, *MOSS, *AGENT, "json", "oasst1_e3_hf", "oasst1_mmlu"), "full": (*BILINGUAL, "oasst1"),
    },
    "internlm_20b": {"qlora": (*BASE, *AGENT)},
    "internlm_chat_7b": {"qlora": ALL},
    "internlm_chat_20b": {"qlora": CHAT},
    "internlm2_1_8b": {"qlora": ALPACA_ONLY, "full": (*ALPACA_ONLY, *PRETRAIN)},
    "internlm2_7b": {
        "qlora": (*BASE_SHORT, *AGENT, "json"),
        "full": (*PRETRAIN, *LONG, "finetune_custom_dataset_e1_sequence_parallel_4"),
    },
    "internlm2_20b": {"qlora": (*BASE_SHORT, *AGENT), "full": (*PRETRAIN, *LONG)},
    "internlm2_chat_1_8b": {"qlora": (*ALPACA_ONLY, *SFT), "full": ALPACA_ONLY},
    "internlm2_chat_7b": {"qlora": (*SHORT, *SFT), "full": LONG},
    "internlm2_chat_20b": {"qlora": (*SHORT, *SFT), "full": LONG},
    "internlm2_5_chat_7b": {"qlora": ("alpaca", "oasst1"), "full": LONG},
    "llama_7b": {"qlora": (*ALL, *MOSS)},
    "llama2_7b": {
        "qlora": (*ALL, *MOSS, *AGENT),
        "full": (
            "alpaca_enzh_8k_sp1", "alpaca_enzh_32k_sp1", "alpaca_enzh_128k_sp8", "alpaca_enzh_256k_sp8",
            "alpaca_enzh_1M_sp16", *PRETRAIN, "pgbooks_400iters_sp1", "pgbooks_400iters_sp4", "wizardlm",
        ),
    },
    "llama2_7b_chat": {"qlora": (*ALL, *SFT)},
    "llama2_70b": {
        "qlora": (*SFT, "open_platypus_e1", "open_platypus_e1_hf"),
        "int8_lora": ("open_platypus_e1", "open_platypus_e1_hf"),
        "full": (
            "alpaca_enzh_8k_sp1", "alpaca_enzh_32k_sp4", "alpaca_enzh_128k_sp8", "alpaca_enzh_256k_sp16", *PRETRAIN,
            "wizardlm",
        ),
    },
    "llama3_8b": {"full": ALPACA_ONLY},
    "llama3_8b_instruct": {"qlora": ALPACA_ONLY, "full": ALPACA_ONLY},
    "llama3_70b_instruct": {"qlora": ("alpaca_e3_2k_gpu8",)},
    "minicpm_1b": {"qlora": ("alpaca_zh", "alpaca_enzh"), "lora": ("alpaca_zh",), "full": ("alpaca_zh", *PRETRAIN)},
    "minicpm_2b": {"qlora": ("alpaca_zh", "alpaca_enzh"), "lora": ("alpaca_zh",), "full": ("alpaca_zh", *PRETRAIN)},
    "mistral_7b": {"qlora": ("skypile_pretrain",), "full": (*PRETRAIN, *LONG)},
    "mixtral_8x7b": {"qlora": ("oasst1",), "full": ("oasst1", *PRETRAIN)},
    "mixtral_8x7b_instruct": {"qlora": ("oasst1", *SFT), "full": ("oasst1",)},
    "phi3_mini_4k_instruct": {"qlora": ALPACA_ONLY, "full": ALPACA_ONLY},
    "phi3_mini_128k_instruct": {"qlora": ALPACA_ONLY, "full": ALPACA_ONLY},
    "qwen_1_8b": {"qlora": CODE_AND, "full": PRETRAIN},
    "qwen_1_8b_chat": {"qlora": (*CODE_AND, *SFT)},
    "qwen_7b": {"qlora": (*ALL, *MOSS), "full": PRETRAIN},
    "qwen_7b_chat": {"qlora": (*ALL, *SFT)},
    "qwen_72b": {"qlora": (*CODE_AND, *SFT), "full": PRETRAIN},
    **{
        f"qwen1_5_{size}": {"qlora": ALPACA_ONLY, "full": (*ALPACA_ONLY, *PRETRAIN)}
        for size in ("0_5b", "1_8b", "4b", "7b", "14b", "72b")
    },
    **{
        f"qwen1_5_{size}_chat": {"qlora": (*ALPACA_ONLY, *SFT), "full": ALPACA_ONLY}
        for size in ("0_5b", "1_8b", "4b", "7b", "14b", "72b")
    },
    "qwen1_5_110b": {"qlora": ALPACA_ONLY, "full": ALPACA_ONLY},
    "qwen1_5_110b_chat": {"qlora": (*ALPACA_ONLY, "alpaca_e3_16k_2gpus"), "full": ALPACA_ONLY},
    "qwen1_5_moe_a2_7_b_chat": {"full": ALPACA_ONLY},
    "starcoder": {"qlora": SFT, "full": PRETRAIN},
    "yi_6b": {"qlora": ("alpaca_enzh", *SFT), "full": PRETRAIN},
    "yi_34b": {"qlora": ("alpaca_enzh", *SFT), "full": PRETRAIN},
    "yi_34b_200k": {
        "full": ("alpaca_enzh_8k_sp1", "alpaca_enzh_32k_sp2", "alpaca_enzh_128k_sp8", "alpaca_enzh_256k_sp8")
    },
    "zephyr_7b_beta": {"qlora": (*ALPACA_ONLY, *SFT), "full": PRETRAIN},
}  # fmt: skip

_LARGE = {"learning_rate": 1e-4, "accumulation": 1}
_LARGE_FULL = {"learning_rate": 1e-5, "accumulation": 1}
_DEEPSEEK_V2 = {**_LARGE_FULL, "save_every": 50, "sample_every": 0, "prompts": (), "system": "", "warmup_ratio": 0.0}
_MLP = ("gate_proj", "down_proj", "up_proj")
_STARCODER = {
    "rank": 16, "alpha": 32, "dropout": 0.05, "targets": ("c_proj", "c_attn", "q_attn"), "learning_rate": 1e-4,
    "weight_decay": 0.05, "sample_every": 200, "prompts": RECIPES["stack_exchange"].asked(),
}  # fmt: skip
_MIXTRAL = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")}
_DEEPSEEK_MOE = {"rank": 16, "alpha": 16, "dropout": 0.05}

# model -> terms of its own, whatever the method; a recipe may know better
OF_MODEL: dict[str, dict[str, Any]] = {
    "phi3_mini_4k_instruct": {"max_length": 4096},
    "phi3_mini_128k_instruct": {"max_length": 131072},
}

# (model, method) -> terms in which it deviates from the method
BY_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek_moe_16b_base", "qlora"): _DEEPSEEK_MOE,
    ("deepseek_moe_16b_chat", "qlora"): _DEEPSEEK_MOE,
    ("deepseek_v2_chat", "full"): _DEEPSEEK_V2,
    ("deepseek_v2_lite_chat", "full"): _DEEPSEEK_V2,
    ("internlm_7b", "full"): {"template": "internlm_chat"},
    ("llama2_70b", "qlora"): {"learning_rate": 3e-4, "targets": _MLP},
    ("llama2_70b", "int8_lora"): {"learning_rate": 3e-4, "rank": 16, "dropout": 0.05, "targets": _MLP},
    ("llama3_70b_instruct", "qlora"): {"learning_rate": 1e-4, "accumulation": 2, "sample_every": 50},
    ("mixtral_8x7b", "qlora"): _MIXTRAL,
    ("mixtral_8x7b_instruct", "qlora"): _MIXTRAL,
    ("qwen1_5_110b", "qlora"): _LARGE,
    ("qwen1_5_110b_chat", "qlora"): _LARGE,
    ("qwen1_5_110b", "full"): _LARGE_FULL,
    ("qwen1_5_110b_chat", "full"): _LARGE_FULL,
    ("starcoder", "qlora"): _STARCODER,
    ("starcoder", "full"): {"prompts": RECIPES["stack_exchange"].asked()},
}  # fmt: skip

_SPEED = {"save_every": -1, "sample_every": 0, "prompts": (), "system": ""}
_SPEED_NOTE = ("made to measure speed: it saves only at the end and asks nothing",)
_HF = {
    "warmup_ratio": None,
    "warmup_iterations": 100 * 16,
    "save_every": 1000 * 16,
    "sample_every": 0,
    "prompts": (),
    "system": "",
}
_HF_NOTE = ("XTuner runs this with the Trainer of transformers, which counts steps: 100 of warm-up, saved every 1000",)


def _speed(length: int, split: int) -> dict[str, Any]:
    return {**_SPEED, "max_length": length, "accumulation": split, "sequence_parallel": split}


# Tails of names -> terms and notes.
TAILS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "8k_sp1": (_speed(8192, 1), _SPEED_NOTE),
    "32k_sp1": (_speed(32768, 1), _SPEED_NOTE),
    "32k_sp2": (_speed(32768, 2), _SPEED_NOTE),
    "32k_sp4": (_speed(32768, 4), _SPEED_NOTE),
    "128k_sp8": (_speed(131072, 8), _SPEED_NOTE),
    "256k_sp8": (_speed(262144, 8), _SPEED_NOTE),
    "256k_sp16": (_speed(262144, 16), _SPEED_NOTE),
    "1M_sp16": (_speed(1048576, 16), _SPEED_NOTE),
    "400iters_sp1": ({}, ()),
    "400iters_sp4": ({"accumulation": 32, "sequence_parallel": 4}, ()),
    "sequence_parallel_4": ({"accumulation": 4, "sequence_parallel": 4}, ()),
    "hf": (_HF, _HF_NOTE),
    "gpu8": ({"batch": 8, "accumulation": 1}, ("XTuner's batch is made for 8 GPUs",)),
    "2k_gpu8": ({}, ("XTuner's batch is made for 8 GPUs",)),
    "16k_2gpus": (
        {"max_length": 16384, "accumulation": 2, "sequence_parallel": 2, "sample_every": 50}, ("made for 2 GPUs",)
    ),
    "32k_varlen": ({"max_length": 32768}, ()),
}  # fmt: skip

# name -> terms that only it has
BY_NAME: dict[str, dict[str, Any]] = {
    "deepseekcoder_6_7b_instruct_qlora_custom_sft_e1": {
        "prompts": RECIPES["code_alpaca"].asked(), "sample_every": 100
    },
    "internlm2_5_chat_7b_qlora_alpaca_e3": {"accumulation": 1},
    "llama2_7b_full_wizardlm_e1": {"batch": 2, "sample_every": 200},
    "llama2_70b_full_wizardlm_e1": {"accumulation": 4, "epochs": 3},
    "minicpm_1b_full_custom_pretrain_e1": {"accumulation": 1},
    "qwen1_5_moe_a2_7_b_chat_full_alpaca_e3": {
        "accumulation": 1, "max_length": 32768, "sample_every": 50, "sources": (ALPACA, ALPACA_ZH)
    },
    "starcoder_qlora_custom_sft_e1": {"sources": (replace(OWN, rows=20000),)},
    **dict.fromkeys(
        (
            "internlm2_7b_full_finetune_custom_dataset_e1", "internlm2_20b_full_finetune_custom_dataset_e1",
            "internlm2_7b_full_finetune_custom_dataset_e1_sequence_parallel_4",
        ),
        {"template": "internlm2_chat"},
    ),
}  # fmt: skip
INT8_NOTE = "XTuner keeps the base in 8 bits (LLM.int8); here it is kept in 4 (NF4)"

_CONTEXT = {"max_length": 32768}
_TEMPLATE = {"template": "internlm2_chat"}
_LIST: tuple[Line, ...] = (
    Line(
        "cohere_100b_128k_sp32", "cohere_100b", "full", "alpaca_enzh",
        terms={
            "epochs": None, "iterations": 16, "accumulation": 32, "sequence_parallel": 32, "max_length": 131072,
            "keep": 1, "sample_every": 10, "max_new_tokens": 100, "warmup_ratio": 0.0, "final_ratio": 0.15,
        },
    ),
    Line("internlm2_7b_w_internevo_dataset", "internlm2_7b", "full", "w_internevo_dataset", terms=_TEMPLATE),
    Line("internlm2_7b_w_tokenized_dataset", "internlm2_7b", "full", "w_tokenized_dataset", terms=_TEMPLATE),
    Line("internlm2_7b_w_untokenized_dataset", "internlm2_7b", "full", "w_untokenized_dataset", terms=_TEMPLATE),
    Line("mistral_7b_w_tokenized_dataset", "mistral_7b", "full", "w_tokenized_dataset", terms=_TEMPLATE),
    Line(
        "mistral_7b_w_untokenized_dataset", "mistral_7b", "full", "w_untokenized_dataset",
        notes=("XTuner names a folder of its makers as the base; here it is the model itself",),
    ),
    Line(
        "internlm_7b_full_intern_repo_dataset_template", "internlm_7b", "full", "intern_repo_dataset",
        notes=("XTuner leaves the base model open",),
    ),
    Line(
        "mistral_7b_full_finetune_custom_sft_e1", "mistral_7b", "qlora", "custom_sft", terms=_CONTEXT,
        notes=("the name says full; XTuner trains QLoRA here",),
    ),
    Line("starcoder_qlora_stack_exchange_example", "starcoder", "qlora", "stack_exchange"),
)  # fmt: skip

_DPO, _ORPO = {"learning_rate": 5e-7}, {"learning_rate": 5e-6}
_REWARD = {"epochs": 1, "sample_every": 0, "prompts": (), "system": "", "template": ""}
_E5 = {"epochs": 5, "warmup_ratio": 0.01}


def _preference() -> Iterator[Line]:
    """DPO, ORPO and reward models."""
    small, chat, llama = "internlm2_chat_1_8b", "internlm2_chat_7b", "llama3_8b_instruct"
    for task, terms in (("dpo", _DPO), ("orpo", _ORPO)):
        for tail, recipe in (
            ("", "orpo_mix"),
            ("_varlenattn", "orpo_mix"),
            ("_varlenattn_jsonl_dataset", "jsonl_dataset"),
        ):
            yield _pairs(f"{small}_{task}_full{tail}", f"{small}_sft", "full", recipe, task, terms)
    for model, base in ((chat, f"{chat}_sft"), (llama, llama)):
        yield _pairs(f"{model}_dpo_qlora_varlenattn", base, "qlora", "orpo_mix", "dpo", _DPO)
    for model, base in ((chat, f"{small}_sft"), (llama, llama)):
        name = f"{model}_orpo_qlora_varlenattn_ultrafeedback_e5"
        notes = ("the name says 7b; XTuner trains the 1.8b model here",) if model == chat else ()
        yield _pairs(name, base, "qlora", "ultrafeedback", "orpo", _ORPO | _E5, notes)
    for model in ("minicpm_1b", "minicpm_2b"):
        yield _pairs(f"{model}_dpo_qlora", model, "qlora", "orpo_mix", "dpo", _DPO)
    for tail, recipe, terms in (
        ("ultrafeedback", "ultrafeedback", {"batch": 4}),
        ("varlenattn_ultrafeedback", "ultrafeedback", {}),
        ("varlenattn_jsonl_dataset", "jsonl_dataset", {}),
    ):
        yield _pairs(f"{small}_reward_full_{tail}", f"{small}_sft", "full", recipe, "reward", _REWARD | terms)
    qlora = _REWARD | {"learning_rate": 1e-4}
    yield _pairs(
        f"{small}_reward_qlora_varlenattn_ultrafeedback", f"{small}_sft", "qlora", "ultrafeedback", "reward", qlora
    )
    yield _pairs(f"{llama}_reward_full_varlenattn_ultrafeedback", llama, "full", "ultrafeedback", "reward", _REWARD)


def _pairs(
    name: str, model: str, method: str, recipe: str, task: str, terms: dict[str, Any], notes: tuple[str, ...] = ()
) -> Line:
    kind = {"reward": "a reward model"}.get(task, task.upper())
    missing = f"Training on pairs of answers ({kind}) comes later; the pairs can be imported and looked at."
    return Line(name, model, method, recipe, task, {"pack": False, **terms}, missing, notes)


VISION_MISSING = "Training with pictures comes later: Retune loads the language model only."
VIT = "clip_vit_large_p14_336"
_PICTURE_LENGTH = 2048 - (336 // 14) ** 2  # what is left beside a picture's 576 positions
_LONG_PICTURE = 4096 - (336 // 14) ** 2
_VISION = {"pack": False, "max_length": _PICTURE_LENGTH, "epochs": 1, "accumulation": 1}
_ALIGN = {**_VISION, "learning_rate": 1e-3, "batch": 32}
_TUNE_QLORA = {**_VISION, "batch": 16, "rank": 512, "alpha": 256, "dropout": 0.05}
_TUNE_FULL = {**_VISION, "learning_rate": 2e-5, "batch": 8, "accumulation": 2}
_RARE = {"save_every": 50000, "sample_every": 50000}
_EVERY_1000 = {"save_every": 1000, "sample_every": 1000}
_CAPTIONS = {**_ALIGN, "batch": 16, "accumulation": 2, "max_length": _LONG_PICTURE, **_EVERY_1000}
_SFT = {"max_length": _LONG_PICTURE, "save_every": 5000, "sample_every": 5000}
_PROJECTOR = ("only the projector between the picture encoder and the language model learns",)


def _llava() -> Iterator[Line]:
    for model in (
        "internlm2_chat_1_8b",
        "internlm2_chat_7b",
        "internlm2_chat_20b",
        "internlm_chat_7b",
        "vicuna_7b_v15",
        "vicuna_13b_v15",
    ):
        quantised = not model.startswith("internlm2_chat_") or model.endswith("1_8b")
        yield _vision(f"llava_{model}_{VIT}_e1_gpu8_pretrain", model, "full", "llava_pretrain", _ALIGN, _PROJECTOR)
        name = f"llava_{model}_qlora_{VIT}_lora_e1_gpu8_finetune"
        terms = _TUNE_QLORA | ({} if quantised or model.endswith("7b") else {"batch": 8, "accumulation": 2})
        yield _vision(name, model, "qlora", "llava_instruct", terms)
    name = f"llava_vicuna_7b_v15_qlora_{VIT}_lora_e1_gpu8_finetune_refcoco"
    yield _vision(name, "vicuna_7b_v15", "qlora", "refcoco", _TUNE_QLORA)
    for size, batch in (("7b", 8), ("20b", 4)):
        terms = _TUNE_FULL | {"batch": batch, "accumulation": 16 // batch}
        model = f"internlm2_chat_{size}"
        yield _vision(f"llava_{model}_{VIT}_e1_gpu8_finetune", model, "full", "llava_instruct", terms)
    for size in ("7b", "13b"):
        model, name = f"vicuna_{size}_v15", f"llava_v15_{size}"
        lora = {**_TUNE_QLORA, "rank": 128}
        yield _vision(f"{name}_pretrain", model, "full", "llava_pretrain", _ALIGN, _PROJECTOR)
        tune = _TUNE_FULL | {"batch": 16, "accumulation": 1}
        yield _vision(f"{name}_finetune", model, "full", "llava_instruct", tune)
        yield _vision(f"{name}_finetune_lora", model, "lora", "llava_instruct", lora)
    for model in ("llama3_8b_instruct", "phi3_mini_4k_instruct"):
        name = f"llava_{model}"
        yield _vision(f"{name}_{VIT}_e1_gpu8_pretrain", model, "full", "llava_pretrain", _ALIGN, _PROJECTOR)
        yield _vision(f"{name}_{VIT}_e1_gpu8_sharegpt4v_pretrain", model, "full", "sharegpt4v", _CAPTIONS)
        tune = {**_TUNE_FULL, **_EVERY_1000}
        yield _vision(f"{name}_full_{VIT}_e1_gpu8_finetune", model, "full", "llava_instruct", tune)
    llama, tail = "llama3_8b_instruct", "e1_gpu8"
    name = f"llava_{llama}"
    yield _vision(f"{name}_full_{VIT}_lora_{tail}_finetune", llama, "full", "llava_instruct", _TUNE_FULL | _EVERY_1000)
    terms = {**_TUNE_FULL, **_SFT, "batch": 4, "accumulation": 4}
    yield _vision(f"{name}_full_{VIT}_lora_{tail}_internvl_finetune", llama, "full", "internvl_sft", terms)
    terms = {**_VISION, "dropout": 0.05, "accumulation": 128, **_RARE}
    yield _vision(f"{name}_qlora_{VIT}_e1_gpu1_finetune", llama, "qlora", "llava_instruct", terms)
    terms = {**_ALIGN, "batch": 1, "accumulation": 256, **_RARE}
    yield _vision(f"{name}_quant_{VIT}_e1_gpu1_pretrain", llama, "full", "llava_pretrain", terms, _PROJECTOR)
    notes = (*_PROJECTOR, "the name says 70b; XTuner names the 8b model here")
    terms = {**_ALIGN, "learning_rate": 5e-4}
    yield _vision(
        f"llava_llama3_70b_instruct_quant_{VIT}_e1_gpu8_pretrain", llama, "full", "llava_pretrain", terms, notes
    )
    terms = {**_TUNE_FULL, **_SFT, "epochs": 2}
    name = f"llava_phi3_mini_4k_instruct_full_{VIT}_full_e2_gpu8_internvl_finetune"
    yield _vision(name, "phi3_mini_4k_instruct", "full", "internvl_sft", terms)


INTERNVL = {
    "v1_5_internlm2_2b": ("internlm2_chat_1_8b", "OpenGVLab/Mini-InternVL-Chat-2B-V1-5"),
    "v1_5_internlm2_26b": ("internlm2_chat_20b", "OpenGVLab/InternVL-Chat-V1-5"),
    "v1_5_phi3_4b": ("phi3_mini_128k_instruct", "OpenGVLab/Mini-InternVL-Chat-4B-V1-5"),
    "v2_internlm2_2b": ("internlm2_chat_1_8b", "OpenGVLab/InternVL2-2B"),
    "v2_internlm2_26b": ("internlm2_chat_20b", "OpenGVLab/InternVL2-26B"),
    "v2_internlm2_5_8b": ("internlm2_5_chat_7b", "OpenGVLab/InternVL2-8B"),
    "v2_phi3_4b": ("phi3_mini_128k_instruct", "OpenGVLab/InternVL2-4B"),
}


def _internvl() -> Iterator[Line]:
    for key, (model, base) in INTERNVL.items():
        large, first = key.endswith("26b"), key == "v1_5_internlm2_26b"
        terms = {
            "pack": False, "epochs": 1, "learning_rate": 1e-6, "weight_decay": 0.01 if first else 0.05,
            "rank": 128, "alpha": 256, "dropout": 0.05, "max_length": 4096 if first else 8192,
            "save_every": 1000, "keep": 1, "sample_every": 0, "prompts": (),
        }  # fmt: skip
        full = terms | ({"batch": 1, "accumulation": 8} if large else {"batch": 4, "accumulation": 4})
        lora = terms | ({"batch": 2, "accumulation": 4} if large else {"batch": 8, "accumulation": 2})
        for part, method, own in (("", "full", full), ("lora_", "lora", lora), ("qlora_", "qlora", lora)):
            yield _vision(f"internvl_{key}_{part}finetune", model, method, "llava_instruct", own, base=base)


def _vision(
    name: str,
    model: str,
    method: str,
    recipe: str,
    terms: dict[str, Any],
    notes: tuple[str, ...] = (),
    base: str = "",
) -> Line:
    return Line(name, model, method, recipe, "vision", terms, VISION_MISSING, notes, base)


def lines() -> Iterator[Line]:
    """All of XTuner's configs, in no order."""
    for model, methods in GRID.items():
        for method, recipes in methods.items():
            yield from (line_of(model, method, recipe) for recipe in recipes)
    yield from (_deviating(line) for line in _LIST)
    yield from _preference()
    yield from _llava()
    yield from _internvl()


def line_of(model: str, method: str, tag: str) -> Line:
    """The line of a recipe's tag (alpaca, alpaca_e5, open_platypus_e1_hf, alpaca_enzh_8k_sp1) for a model."""
    recipe = recipe_of(tag)
    rest = tag.removeprefix(recipe).strip("_")
    if not rest:
        rest = f"e{RECIPES[recipe].epochs}"
    epochs, _underscore, tail = rest.partition("_") if rest[0] == "e" and rest[1].isdigit() else ("", "", rest)
    terms: dict[str, Any] = {"epochs": int(epochs[1:])} if epochs else {}
    own, notes = TAILS[tail] if tail else ({}, ())
    if method == "int8_lora":
        notes = (*notes, INT8_NOTE)
    name = f"{model}_{method}_{recipe}_{rest}"
    return _deviating(Line(name, model, method, recipe, terms=terms | own, notes=notes))


def _deviating(line: Line) -> Line:
    return replace(line, terms=line.terms | BY_NAME.get(line.name, {}))


def recipe_of(tag: str) -> str:
    """The recipe that a tag begins with, the longest that fits; "" when none does."""
    fits = (name for name in RECIPES if tag == name or tag.startswith(f"{name}_"))
    return max(fits, key=len, default="")
