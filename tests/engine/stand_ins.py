"""A tiny model of each architecture that built-in configs train: transformers' own config class, shrunk."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from studio.data.formats import Conversation, Message
from studio.data.tokens import Example, encode_conversation
from studio.engine.models.load import LoadedModel
from tests.engine.folders import SPECIAL, TEMPLATE, _byte_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    },
    "deepseek_v2": {
        "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 16, "num_key_value_heads": 4,
    },
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 512, "multi_query": True},
    "phi3": {"rope_scaling": None},
}  # fmt: skip


def underneath(model_type: str) -> str:
    """The architecture that stands in: the model's own where transformers has it, else Llama, which such models are
    alike to but for names (and ChatGLM only in shape)."""
    return model_type if model_type in CONFIG_MAPPING_NAMES else "llama"


def make_stand_in(folder: Path, model_type: str) -> Path:
    """A complete folder of that architecture with random weights and a byte tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = _byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    special = {"eos_token": SPECIAL[2], "bos_token": SPECIAL[1], "pad_token": SPECIAL[0]}
    settings = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    kind = underneath(model_type)
    values = {**SMALL, **MORE.get(kind, {}), "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def examples_for(loaded: LoadedModel, is_text: bool, max_length: int, num_rows: int = 8) -> list[Example]:
    """Rows as the config's template writes them; whole texts for pretraining."""
    made = []
    for number in range(num_rows):
        question, answer = f"Name number {number}.", f"It is {number} and no other. " * (1 + number % 3)
        messages = (Message("user", question), Message("assistant", answer))
        row = Conversation((Message("assistant", answer),), {"kind": "text"}) if is_text else Conversation(messages, {})
        made.append(encode_conversation(row, loaded.template, loaded.tokenizer, max_length))
    return made
