"""The studio's own trainer, and the check that its gradient is the right one."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from worker import Channel, Counts, Meter, read_rows

from studio.config.schema import RunConfig, parse_config
from studio.data.tokens import IGNORE_INDEX, Example
from studio.engine import adapters, devices, environment
from studio.engine.loop import StepResult, Trainer
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.parts import weight_of

REFERENCE_TOKENS = 2048  # that the reference computes at once, padding among them


def train(job: dict[str, Any], meter: Meter, _: Channel) -> None:
    """At the product's own settings: bfloat16 where the CPU has it, examples as a prefix tree."""
    config, examples = config_of(job), examples_of(job)
    devices.set_threads()
    dtype = devices.pick_dtype(job.get("dtype", "auto"), torch.device("cpu"))
    trainer = prepare(job, config, dtype)
    meter.ready()
    size = job["rows_per_step"]
    for number in range(job["num_steps"]):
        result = trainer.step(examples[number * size : (number + 1) * size], number + 1)
        meter.step(result.loss, count(result))


def gradient(job: dict[str, Any], _: Meter, channel: Channel) -> None:
    """Tell how far the first step's gradient is from that of a padded float32 reference with the whole logits.

    "float32" and "bfloat16" are the trainer's relative errors, "padded bfloat16" that of the reference itself when it
    computes in bfloat16: what any tool loses to the number format.
    """
    device, config = torch.device("cpu"), config_of(job | {"max_grad_norm": 0.0, "learning_rate": 1e-12})
    devices.set_threads()
    examples = examples_of(job)[: job["rows_per_step"]]
    exact = reference(job, config, examples, torch.float32)
    errors = {"padded bfloat16": distance(reference(job, config, examples, torch.bfloat16), exact)}
    for dtype in (torch.float32, devices.pick_dtype("auto", device)):
        trainer = prepare(job, config, dtype, wake=True)
        trainer.step(examples, 1)
        name = str(dtype).removeprefix("torch.")
        errors[name] = distance([each.grad for each in adapters.trainable_parameters(trainer.model)], exact)
    channel.say(errors=errors)


def prepare(job: dict[str, Any], config: RunConfig, dtype: torch.dtype, wake: bool = False) -> Trainer:
    """A trainer as the `train` verb makes it, with the adapter that every tool begins with."""
    environment.prepare()
    loaded = load(job, config, torch.float32 if config.method == "full" else dtype)
    model = attach(job, config, loaded, wake)
    return Trainer(model, config, dtype, job["num_steps"], loaded.pad_id)


def load(job: dict[str, Any], config: RunConfig, dtype: torch.dtype) -> LoadedModel:
    bits, attention = 4 if config.method == "qlora" else 0, config.model.attention
    return load_base(Path(job["model"]), dtype=dtype, attention=attention, bits=bits, device=torch.device("cpu"))


def attach(job: dict[str, Any], config: RunConfig, loaded: LoadedModel, wake: bool) -> nn.Module:
    """`wake`: with another B than zero, behind which A has no gradient to compare."""
    model = adapters.attach(loaded, config)
    if job["adapter"] is None:
        return model
    state = load_file(job["adapter"])
    chance = torch.Generator().manual_seed(0)
    for name in sorted(state):
        if wake and "lora_B" in name:
            state[name] = torch.randn(state[name].shape, generator=chance) * 0.02
    adapters.load_trainable_state(model, state)
    return model


def reference(job: dict[str, Any], config: RunConfig, examples: list[Example], dtype: torch.dtype) -> list[Tensor]:
    """The gradient by the simplest way: rows padded, eager attention, whole logits, the mean over trained tokens.

    A 4-bit base is unpacked for good: bitsandbytes' own layers compute in a format of their choice. Layers are computed
    again on the way back, for eager attention keeps gigabytes of a long row.
    """
    eager = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    full = config.method == "full"
    model = attach(job, config, load(job, eager, torch.float32 if full else dtype), wake=True)
    unpack(model, dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    num_trained = sum(example.num_trained_tokens for example in examples)
    num_rows = max(1, REFERENCE_TOKENS // max(len(example.input_ids) for example in examples))
    for start in range(0, len(examples), num_rows):
        ids, labels, seen = padded(examples[start : start + num_rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=full and dtype == torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits.float()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (loss / num_trained).backward()
    return [parameter.grad for parameter in adapters.trainable_parameters(model)]


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a linear layer of plain numbers in the place of every 4-bit one."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "compute_dtype") and not hasattr(child, "base_layer"):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, dtype=dtype)
                plain.weight = nn.Parameter(weight_of(child, dtype), requires_grad=False)
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.to(dtype), requires_grad=False)
                setattr(parent, name, plain)


def padded(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask, each (rows, longest)."""
    width = max(len(example.input_ids) for example in examples)

    def rows(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([each + [filler] * (width - len(each)) for each in values])

    ids, labels = [each.input_ids for each in examples], [each.labels for each in examples]
    return rows(ids, 0), rows(labels, IGNORE_INDEX), rows([[1] * len(each) for each in ids], 0)


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Length of the difference over that of the exact gradient, all parameters as one vector."""
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, exact, strict=True))
    return float((difference / sum(float(each.float().square().sum()) for each in exact)) ** 0.5)


def count(result: StepResult) -> Counts:
    """Rows that share beginnings are computed without padding; rows that are padded share nothing."""
    real = min(result.num_tokens, result.num_computed_tokens)
    return Counts(result.num_tokens, result.num_trained_tokens, real, result.num_computed_tokens)


def config_of(job: dict[str, Any]) -> RunConfig:
    rows = job["rows_per_step"]
    size = min(job.get("batch", 8), rows)
    return parse_config(
        {
            "method": job["method"],
            "model": {"attention": job.get("attention", "auto")},
            "lora": {"rank": 16, "alpha": 32},
            "data": {"max_length": job["max_length"], "pack": job.get("pack", "tree")},
            "train": {
                "num_steps": job["num_steps"],
                "micro_batch_size": size,
                "gradient_accumulation_steps": rows // size,
                "learning_rate": job["learning_rate"],
                "schedule": "constant",
                "warmup_steps": 0,
                "beta2": 0.999,
                "max_grad_norm": job.get("max_grad_norm", 1.0),
                "gradient_checkpointing": False,
            },
        }
    )


def examples_of(job: dict[str, Any]) -> list[Example]:
    return [Example(row["input_ids"], row["labels"]) for row in read_rows(job["rows"])]
