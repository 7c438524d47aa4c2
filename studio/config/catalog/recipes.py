"""What XTuner's configs learn from, by the word that their names have for it: one table to extend.

A recipe says where its rows are, how they are read, what is asked while training, and what a config with this data
does otherwise than its method alone would.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from studio.config.xtuner.terms import Source
from studio.data.phrasings import load_bank

OWN_FILE = "path/to/your/file.json"  # stands in for the reader's own data
OWN = Source("own", OWN_FILE, "openai")
ALPACA = Source("alpaca", "hf:tatsu-lab/alpaca", "alpaca")
ALPACA_ZH = Source("alpaca_zh", "hf:silk-road/alpaca-data-gpt4-chinese", "alpaca_zh")
OASST1 = Source("oasst1", "hf:timdettmers/openassistant-guanaco", "oasst1")
MOSS_NO_TOOLS = Source("moss_no_tools", "data/moss-003-sft-no-tools.jsonl", "moss_sft")
MOSS_PLUGINS = Source(
    "moss_plugins",
    "data/conversations_with_tools_with_inner_instruction_no_text2image_train_all_random_meta0.5_0.1_0.01_"
    "moss_0709.jsonl",
    "moss_sft",
)
LLAVA_ROOT = "data/llava_data"
LLAVA_PRETRAIN = Source("llava_pretrain", f"{LLAVA_ROOT}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "llava")
LLAVA_INSTRUCT = Source("llava_instruct", f"{LLAVA_ROOT}/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "llava")
REFCOCO_FILE = f"{LLAVA_ROOT}/RefCOCOJson/train.json"
REFCOCO = (
    Source("refcoco", REFCOCO_FILE, "llava", rows=70000), Source("refcoco_inverted", REFCOCO_FILE, "llava", rows=70000),
    LLAVA_INSTRUCT,
)  # fmt: skip
SHAREGPT4V = Source("sharegpt4v", "data/sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json", "llava")
INTERNVL_SFT = tuple(
    Source(name, f"data/internvl_sft/{file}", "llava")
    for name, file in (
        ("sharegpt4v", "sharegpt4v_instruct_gpt4-vision_cap100k.jsonl"), ("llava", "llava_instruct_150k_zh.jsonl"),
        ("sharegpt4v_mix", "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl"),
        ("dvqa", "dvqa_train_200k.jsonl"), ("chartqa", "chartqa_train_18k.jsonl"), ("ai2d", "ai2d_train_12k.jsonl"),
        ("docvqa", "docvqa_train_10k.jsonl"), ("geoqa", "geoqa+.jsonl"), ("synthdog", "synthdog_en.jsonl"),
    )
)  # fmt: skip
ORPO_MIX = Source("orpo_dpo_mix", "hf:mlabonne/orpo-dpo-mix-40k", "orpo_dpo_mix_40k")
ULTRAFEEDBACK = Source(
    "ultrafeedback", "hf:argilla/ultrafeedback-binarized-preferences-cleaned", "orpo_dpo_mix_40k"
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """`epochs` is what its configs are trained for, `prompts` and `system` name texts of the banks, `terms` are what
    it changes. `about` says what the data is, in a few words."""

    sources: tuple[Source, ...]
    about: str
    epochs: int = 3
    prompts: str = "scenery"
    system: str = ""
    terms: dict[str, Any] = field(default_factory=dict)
    missing: str = ""

    def asked(self) -> tuple[str, ...]:
        return tuple(load_bank("xtuner_prompts")["prompts"][self.prompts]) if self.prompts else ()


def system_text(name: str, bot: str = "") -> str:
    """One of XTuner's system texts; "" for none. `bot` is put where the text names the assistant."""
    if not name:
        return ""
    found = load_bank("xtuner_prompts")["systems"] | load_bank("templates")["systems"]
    return str(found[name]).replace("{bot_name}", bot) if bot else str(found[name])


def _own(about: str, format: str, **rest: Any) -> Recipe:
    return Recipe((replace(OWN, format=format),), about, **rest)


_TOKENISED = "Rows of token ids (InternEvo's .bin) cannot be imported; Retune tokenises text itself."
_LONG = {
    "learning_rate": 4e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "accumulation": 1, "max_length": 32768,
    "warmup_ratio": 0.025, "final_ratio": 0.15,
}  # fmt: skip
_MOSS = {"template": "moss_sft", "pack": False}

RECIPES = {
    "alpaca": Recipe((ALPACA,), "52,000 instructions with answers, English", system="alpaca"),
    "alpaca_zh": Recipe((ALPACA_ZH,), "Alpaca in Chinese, by GPT-4", system="alpaca"),
    "alpaca_enzh": Recipe((ALPACA, ALPACA_ZH), "Alpaca in English and Chinese", system="alpaca"),
    "alpaca_enzh_oasst1": Recipe((ALPACA, ALPACA_ZH, OASST1), "Alpaca in both languages, and oasst1", system="alpaca"),
    "oasst1": Recipe((OASST1,), "conversations written by people (Guanaco)"),
    "oasst1_512": Recipe((OASST1,), "oasst1 in short sequences", terms={"max_length": 512, "pack": False}),
    "oasst1_mmlu": Recipe(
        (OASST1,), "oasst1, scored on MMLU questions", missing="XTuner also scores on MMLU while it trains; not here."
    ),
    "code_alpaca": Recipe(
        (Source("code_alpaca", "hf:HuggingFaceH4/CodeAlpaca_20K", "code_alpaca"),), "programming tasks",
        prompts="code", system="coder", terms={"sample_every": 100},
    ),
    "tiny_codes": Recipe(
        (Source("tiny_codes", "hf:nampdn-ai/tiny-codes", "tiny_codes"),), "short programs with explanations",
        epochs=1, prompts="code", system="coder",
    ),
    "lawyer": Recipe(
        (
            Source("crime_kg_assistant", "data/CrimeKgAssitant清洗后_52k.json", "crime_kg_assitan"),
            Source("law_reference", "data/训练数据_带法律依据_92k.json", "law_reference"),
        ),
        "questions on Chinese law", prompts="law", system="lawyer",
    ),
    "open_platypus": Recipe(
        (Source("open_platypus", "hf:garage-bAInd/Open-Platypus", "alpaca"),), "logic and science", system="alpaca"
    ),
    "arxiv_gentitle": Recipe(
        (Source("arxiv", "data/arxiv_data.json", "arxiv"),), "paper titles from abstracts",
        prompts="paper_title", system="arxiv_gentile",
    ),
    "colorist": Recipe(
        (Source("colors", "hf:burkelibbey/colors", "colors"),), "colours from descriptions",
        epochs=5, prompts="colour", system="colorist", terms={"sample_every": 200},
    ),
    "sql": Recipe(
        (Source("sql", "hf:b-mc2/sql-create-context", "sql"),), "SQL from questions", prompts="sql", system="sql"
    ),
    "medical": Recipe(
        (Source("medical", "hf:shibing624/medical", "medical", subset="finetune"),), "medical questions, Chinese",
        epochs=1, prompts="medical", system="medical",
    ),
    "openorca": Recipe(
        (Source("openorca", "hf:Open-Orca/OpenOrca", "openorca"),), "millions of instructions with reasoning",
        epochs=1, terms={"sample_every": 5000},
    ),
    "wizardlm": Recipe(
        (Source("wizardlm", "hf:WizardLM/WizardLM_evol_instruct_V2_196k", "wizardlm"),), "evolved instructions",
        epochs=1,
    ),
    "moss_sft_all": Recipe(
        (MOSS_NO_TOOLS, MOSS_PLUGINS), "conversations with and without tools", epochs=1, prompts="moss",
        system="moss_sft", terms=_MOSS,
    ),
    "moss_sft_plugins": Recipe(
        (MOSS_PLUGINS,), "conversations with tools", epochs=1, prompts="moss", system="moss_sft", terms=_MOSS
    ),
    "msagent_react": Recipe(
        (Source("msagent", "modelscope:damo/MSAgent-Bench", "msagent_react"),), "an agent that calls tools",
        prompts="agent", system="agent",
        terms={"template": "default", "batch": 8, "accumulation": 1, "pack": False},
    ),
    "stack_exchange": Recipe(
        (Source("stack_exchange", "hf:ArmelR/stack-exchange-instruction", "stack_exchange", rows=20000),),
        "questions on programming", prompts="python_body", terms={"sample_every": 200, "epochs": 1},
        missing="XTuner reads the folder data/finetune of this data set; check the subset you get.",
    ),
    "skypile_pretrain": Recipe(
        (Source("skypile", "hf:Skywork/SkyPile-150B", "pretrain"),), "Chinese web text", epochs=1, prompts="skypile",
        terms={"template": "none", "dropout": 0.05, "max_new_tokens": 100},
    ),
    "pgbooks": Recipe(
        (Source("pgbooks", "hf:emozilla/pg_books-tokenized-bos-eos-chunked-65536"),), "whole books, tokenised",
        epochs=1, prompts="", missing=_TOKENISED,
        terms={
            "template": "none", "pack": False, "max_length": 65536, "accumulation": 8, "keep": 1, "sample_every": 0,
            "warmup_ratio": 0.05, "final_ratio": 0.15,
        },
    ),
    "custom_pretrain": _own(
        "your own texts", "pretrain", epochs=1, prompts="pretraining", terms={"template": "none"}
    ),
    "custom_sft": _own("your own conversations", "openai", epochs=1),
    "json": _own("your own conversations, as XTuner keeps them", "xtuner"),
    "finetune_custom_dataset": _own("your own conversations, long", "xtuner", epochs=1, terms=_LONG),
    "w_tokenized_dataset": _own("rows that InternEvo tokenised", "", epochs=1, terms=_LONG, missing=_TOKENISED),
    "w_internevo_dataset": _own("rows that InternEvo tokenised", "", epochs=1, terms=_LONG, missing=_TOKENISED),
    "w_untokenized_dataset": _own("InternEvo's rows before tokenising", "", epochs=1, terms=_LONG),
    "intern_repo_dataset": _own(
        "rows that InternEvo tokenised", "", epochs=1, missing=_TOKENISED,
        terms=_LONG | {"max_length": 8192, "accumulation": 4},
    ),
    "orpo_mix": Recipe((ORPO_MIX,), "pairs of a better and a worse answer", prompts="preference", system="alpaca"),
    "ultrafeedback": Recipe((ULTRAFEEDBACK,), "pairs of answers, scored", prompts="preference", system="alpaca"),
    "jsonl_dataset": Recipe(
        (Source("pairs", "path/to/your/pairs.jsonl", "preference"),), "your own pairs of answers",
        prompts="preference", system="alpaca",
    ),
    "llava_pretrain": Recipe((LLAVA_PRETRAIN,), "558,000 pictures with captions", epochs=1, prompts="picture"),
    "llava_instruct": Recipe((LLAVA_INSTRUCT,), "665,000 conversations on pictures", epochs=1, prompts="picture"),
    "refcoco": Recipe(REFCOCO, "where things are in a picture", epochs=1, prompts="picture"),
    "sharegpt4v": Recipe((SHAREGPT4V,), "1.2 million long captions", epochs=1, prompts="picture"),
    "internvl_sft": Recipe(INTERNVL_SFT, "1.3 million conversations on pictures", epochs=1, prompts="picture"),
}  # fmt: skip
