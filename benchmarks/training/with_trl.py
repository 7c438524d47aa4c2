"""TRL's SFTTrainer."""

from typing import Any

import torch
from datasets import Dataset
from hooks import Rounds, packs_of, shape_of
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from worker import Channel, Meter, read_rows

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def train(job: dict[str, Any], meter: Meter, _: Channel) -> None:
    """Defaults: float32 weights under bfloat16 autocast, checkpointing, rows padded, here in the file's order.

    Best: bfloat16 weights, no checkpointing, rows packed best-fit ("packing").
    """
    best, method = job["setting"] == "best", job["method"]
    rows = read_rows(job["rows"])
    model: dict[str, Any] = {}
    whole = job["name"] == "pretraining"  # rows as long as a pack: nothing to pack
    named = {"max_length": job["max_length"], **shape_of(job, 1 if best and whole else None)}
    if job.get("attention"):
        model["attn_implementation"] = job["attention"]
    if best and method != "full":
        model["dtype"] = "bfloat16"
        named["bf16"] = False
    if best:
        named["gradient_checkpointing"] = False
    if best and not whole and not job.get("padded"):
        packs, length = packs_of(job, rows)
        named |= {"packing": True, "max_length": length, "per_device_train_batch_size": 1}
        named["gradient_accumulation_steps"] = packs
    else:
        named["train_sampling_strategy"] = "sequential"
    if method == "qlora":
        model["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**named, report_to=[], model_init_kwargs=model),
        train_dataset=Dataset.from_list(rows),
        peft_config=None if method == "full" else LoraConfig(**LORA),
        callbacks=[Rounds(job, meter)],
    )
    trainer.train()
