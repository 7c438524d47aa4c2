"""transformers' Trainer with PEFT, the base line."""

from typing import Any

import torch
from datasets import Dataset
from hooks import Rounds, shape_of
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from worker import Channel, Meter, read_rows

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def train(job: dict[str, Any], meter: Meter, _: Channel) -> None:
    """Defaults: rows padded, in batches of 8. Best: batches of 4 rows flattened, so nothing is padded."""
    best = job["setting"] == "best"
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in read_rows(job["rows"])]
    full = job["method"] == "full"
    collator: Any = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job["model"]))
    whole = job["name"] == "pretraining"  # rows as long as a pack: nothing to flatten
    if best and not whole and not job.get("padded"):
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        collator = DataCollatorWithFlattening()
    arguments = TrainingArguments(
        **shape_of(job, job.get("batch", 1 if whole else 4) if best else None),
        train_sampling_strategy="sequential",
        report_to=[],
        bf16=best and full,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model_of(job, best),
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Rounds(job, meter)],
    )
    trainer.train()


def model_of(job: dict[str, Any], best: bool) -> nn.Module:
    """With the method's usual recipe; the best setting of QLoRA leaves checkpointing out."""
    method = job["method"]
    named: dict[str, Any] = {}
    if job.get("attention"):
        named["attn_implementation"] = job["attention"]
    if method == "full":
        named["dtype"] = torch.float32
    if method == "qlora":
        named["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(job["model"], **named)
    if method == "full":
        return model
    if method == "qlora" and not best:
        model = prepare_model_for_kbit_training(model)
    return get_peft_model(model, LoraConfig(**LORA))
