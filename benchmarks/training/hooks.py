"""What the workers of tools that stand on transformers' Trainer share: counting tokens, and stopping between rounds."""

import math
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor, nn, no_grad
from transformers import Trainer, TrainerCallback
from worker import Counts, Meter

PACK_LENGTH = 512  # longer packs only cost: attention in a pack grows with its square


def shape_of(job: dict[str, Any], batch: int | None = None) -> dict[str, Any]:
    """Arguments of every tool: the job's rows per step, and the optimizer that all tools are given."""
    rows = job["rows_per_step"]
    size = min(batch or 8, rows)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": math.ceil(rows / size),
        "max_steps": job["num_steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "output_dir": job["scratch"],
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def packs_of(job: dict[str, Any], rows: list[dict[str, list[int]]]) -> tuple[int, int]:
    """(packs a step, their length), so that a step's packs hold about as many tokens as its rows.

    Lengths are multiples of 8: LLaMA-Factory pads packs to those, but not their positions, and fails where it has to.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths) / len(rows) * job["rows_per_step"]
    packs = max(1, round(tokens / max(PACK_LENGTH, max(lengths))))
    return packs, math.ceil(max(*lengths, tokens / packs) / 8) * 8


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Waits for each round, before the first step and where a step's loss is logged."""

    def __init__(self, job: dict[str, Any], meter: Meter) -> None:
        self._adapter, self._meter = job["adapter"], meter
        self._counted: list[Counts] = []
        self._step = Counts()
        self._hook()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        load_adapter(model, self._adapter)
        self._meter.ready()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            step, self._step = self._step, Counts()
            self._meter.step(logs["loss"], step)

    def _hook(self) -> None:
        """Count tokens where batches are made; add them to the step when the batch is trained, not when fetched."""
        train_step, loader = Trainer.training_step, Trainer.get_train_dataloader

        def training_step(trainer: Any, model: Any, inputs: dict[str, Tensor], *rest: Any, **named: Any) -> Tensor:
            counts = self._counted.pop(0)
            counts.computed = inputs["input_ids"].numel()
            self._step.add(counts)
            return train_step(trainer, model, inputs, *rest, **named)

        def get_train_dataloader(trainer: Any) -> Any:
            collate = trainer.data_collator

            def counting(features: list[dict[str, Any]], *rest: Any) -> Any:
                self._counted.append(_count(features))
                return collate(features, *rest)

            trainer.data_collator = counting
            return loader(trainer)

        transformers.Trainer.training_step = training_step
        transformers.Trainer.get_train_dataloader = get_train_dataloader


def _count(features: list[dict[str, Any]]) -> Counts:
    counts = Counts()
    for feature in features:
        mask = feature.get("attention_mask")  # LLaMA-Factory's packs are padded, with 0 in their mask
        tokens = len(feature["input_ids"]) if mask is None else sum(value != 0 for value in mask)
        trained = sum(label != -100 for label in feature["labels"][1:])
        counts.add(Counts(effective=tokens, trained=trained, real=tokens))
    return counts


@no_grad()
def load_adapter(model: nn.Module, path: str | None) -> None:
    """Give an adapter the weights that every tool begins with. Raises KeyError when one is not in the file."""
    if path is None:
        return
    state = load_file(path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(state[name.replace(".default", "")])
