"""LLaMA-Factory, through its own entry point, on rows that were tokenised before (its `tokenized_path`)."""

import os
from types import SimpleNamespace
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"

from datasets import Dataset  # noqa: E402
from hooks import Rounds, packs_of, shape_of  # noqa: E402
from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402
from worker import Channel, Meter, read_rows  # noqa: E402

METHODS = {
    "lora": {"finetuning_type": "lora"},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
    "full": {"finetuning_type": "full"},
}


class Prepared(PackedSupervisedDatasetProcessor):  # type: ignore[misc]
    """Its own packing, of rows that have their ids and labels already."""

    def _encode_data_example(self, prompt: list[Any], **_: Any) -> tuple[list[int], list[int]]:
        return prompt[0]["input_ids"], prompt[0]["labels"]


def train(job: dict[str, Any], meter: Meter, _: Channel) -> None:
    """Defaults: bfloat16 weights, checkpointing, rows padded. Best: no checkpointing, `neat_packing`."""
    best = job["setting"] == "best"
    rows = read_rows(job["rows"])
    whole = job["name"] == "pretraining"  # rows as long as a pack: nothing to pack
    named = {
        **shape_of(job, 1 if best and whole else None),
        **METHODS[job["method"]],
        "model_name_or_path": job["model"],
        "stage": "sft",
        "do_train": True,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset": "rows",
        "tokenized_path": os.path.join(job["scratch"], "tokenized"),
        "template": "empty",
        "cutoff_len": job["max_length"],
        "overwrite_output_dir": True,
        "report_to": "none",
        "disable_gradient_checkpointing": best,
    }
    if job.get("attention") == "eager":
        named["flash_attn"] = "disabled"
    if best and not whole and not job.get("padded"):
        packs, length = packs_of(job, rows)
        named |= {"neat_packing": True, "packing": True, "cutoff_len": length - 1}  # it makes packs one longer
        named |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": packs}
        prepared = pack(rows, length - 1)
    else:
        prepared = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        named["disable_shuffling"] = True
    if job["method"] == "full" and best:
        named["bf16"] = True
    Dataset.from_list(prepared).save_to_disk(named["tokenized_path"])
    run_exp(args=named, callbacks=[Rounds(job, meter)])


def pack(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, Any]]:
    """Packs of `length` tokens, and one of padding, as its preprocessing makes them."""
    arguments = SimpleNamespace(cutoff_len=length, neat_packing=True)
    processor = Prepared(template=None, tokenizer=SimpleNamespace(pad_token_id=0), processor=None, data_args=arguments)
    empty = [None] * len(rows)
    examples = {
        "_prompt": [[row] for row in rows],
        "_response": [[None]] * len(rows),
        **{name: empty for name in ("_system", "_tools", "_images", "_videos", "_audios")},
    }
    columns = processor.preprocess_dataset(examples)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
