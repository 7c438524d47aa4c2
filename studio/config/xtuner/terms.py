"""A run in XTuner's terms, and what that is in ours: micro-batch iterations become steps, with the arithmetic shown.

The built-in configs and the import of Python configs both end here, so both convert alike.
"""

from dataclasses import dataclass
from typing import Any

from studio.config.schema import EVERY_ROW

KEEP_ALL = 1000  # the most that RecordSection.keep_last takes; XTuner writes -1
NO_TEMPLATE = "none"


@dataclass(frozen=True)
class Source:
    """One dataset of a run. `rows` limits how many of its rows an epoch takes; 0 takes all."""

    name: str
    source: str
    format: str = ""
    split: str = "train"
    subset: str = ""
    rows: int = 0

    def recipe(self) -> dict[str, str]:
        """As `data.recipes` has it, defaults left out."""
        values = {"source": self.source, "format": self.format, "split": self.split, "subset": self.subset}
        return {key: value for key, value in values.items() if value and (key, value) != ("split", "train")}

    @property
    def portion(self) -> str | dict[str, int]:
        return {"rows": self.rows} if self.rows else EVERY_ROW


@dataclass(frozen=True)
class Terms:
    """XTuner's settings of a run; the defaults are those that nearly all of its configs share.

    `save_every` and `sample_every` count iterations, one micro-batch each; -1 only saves at the end, 0 never samples.
    `accumulation` is accumulative_counts as it stands, which holds `sequence_parallel` as a factor.
    """

    base: str = ""
    task: str = "sft"
    method: str = "qlora"
    template: str = ""
    dtype: str = "auto"
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    continue_from: str = ""
    sources: tuple[Source, ...] = ()
    max_length: int = 2048
    pack: bool = True
    epochs: float | None = 3
    iterations: int | None = None
    batch: int = 1
    accumulation: int = 16
    sequence_parallel: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_norm: float = 1.0
    schedule: str = "cosine"
    warmup_ratio: float | None = 0.03
    warmup_iterations: int = 0
    final_ratio: float = 0.0
    deepspeed: str = ""  # a ZeRO preset
    checkpointing: bool = True
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    sample_every: int = 500
    prompts: tuple[str, ...] = ()
    system: str = ""
    max_new_tokens: int = 600

    @property
    def accumulation_here(self) -> int:
        """Micro-batches of a step on one device, without the factor for sequence parallelism."""
        return max(1, self.accumulation // self.sequence_parallel)

    def steps(self, iterations: int) -> int:
        """Optimizer steps nearest to so many iterations, at least one."""
        return max(1, round(iterations / self.accumulation))


@dataclass(frozen=True)
class Converted:
    """Values of a RunConfig, nested, and remarks on some of them by path (`train.learning_rate`)."""

    values: dict[str, Any]
    remarks: dict[str, str]


# Where each term ends up.
PATHS = {
    "base": "model.base", "task": "task", "method": "method", "template": "data.template", "dtype": "model.dtype",
    "rank": "lora.rank", "alpha": "lora.alpha", "dropout": "lora.dropout", "targets": "lora.target_modules",
    "dora": "lora.dora", "rslora": "lora.rslora", "continue_from": "model.continue_from",
    "sources": "data.sources", "max_length": "data.max_length", "pack": "data.pack", "epochs": "train.num_epochs",
    "iterations": "train.num_steps", "batch": "train.micro_batch_size",
    "accumulation": "train.gradient_accumulation_steps", "optimizer": "train.optimizer",
    "learning_rate": "train.learning_rate", "betas": "train.beta2", "weight_decay": "train.weight_decay",
    "max_norm": "train.max_grad_norm", "schedule": "train.schedule", "warmup_ratio": "train.warmup_ratio",
    "warmup_iterations": "train.warmup_steps", "final_ratio": "train.final_learning_rate_ratio",
    "checkpointing": "train.gradient_checkpointing", "seed": "train.seed", "save_every": "record.save_every_steps",
    "keep": "record.keep_last", "sample_every": "record.sample_every_steps", "prompts": "record.sample_prompts",
    "system": "record.sample_system", "max_new_tokens": "record.sample_max_new_tokens",
}  # fmt: skip


def convert(name: str, terms: Terms) -> Converted:
    """The RunConfig values of a run in XTuner's terms; only what differs from our defaults where that is unusual."""
    values: dict[str, Any] = {
        "name": name,
        "method": terms.method,
        "task": terms.task,
        "model": {"base": terms.base, "dtype": terms.dtype} | _where_set(continue_from=terms.continue_from),
        "lora": _lora(terms),
        "data": _data(terms),
        "train": _train(terms),
        "record": _record(terms),
    }
    if terms.method == "full":
        del values["lora"]
    if terms.deepspeed:
        values["distributed"] = {"strategy": "deepspeed", "deepspeed": terms.deepspeed}
    return Converted(values, _remarks(terms))


def _lora(terms: Terms) -> dict[str, Any]:
    targets = ",".join(terms.targets) or "all-linear"
    values = {"rank": terms.rank, "alpha": terms.alpha, "dropout": terms.dropout, "target_modules": targets}
    return values | _where_set(dora=terms.dora, rslora=terms.rslora)


def _where_set(**values: Any) -> dict[str, Any]:
    """Those that are not off: few configs have them, so most need not speak of them."""
    return {name: value for name, value in values.items() if value}


def _data(terms: Terms) -> dict[str, Any]:
    return {
        "sources": {source.name: source.portion for source in terms.sources},
        "recipes": {source.name: source.recipe() for source in terms.sources},
        "max_length": terms.max_length,
        "pack": "sequence" if terms.pack else "none",
        "template": terms.template,
    }


def _train(terms: Terms) -> dict[str, Any]:
    warmup: dict[str, Any] = {"warmup_ratio": terms.warmup_ratio}
    if terms.warmup_ratio is None:
        warmup = {"warmup_steps": terms.steps(terms.warmup_iterations) if terms.warmup_iterations else 0}
    return {
        "num_steps": terms.steps(terms.iterations) if terms.iterations else None,
        "num_epochs": terms.epochs,
        "micro_batch_size": terms.batch,
        "gradient_accumulation_steps": terms.accumulation_here,
        "learning_rate": terms.learning_rate,
        "schedule": terms.schedule,
        **warmup,
        "final_learning_rate_ratio": terms.final_ratio,
        "optimizer": terms.optimizer,
        "weight_decay": terms.weight_decay,
        "beta1": terms.betas[0],
        "beta2": terms.betas[1],
        "max_grad_norm": terms.max_norm,
        "gradient_checkpointing": terms.checkpointing,
        "seed": terms.seed,
    }


def _record(terms: Terms) -> dict[str, Any]:
    sample_every = terms.steps(terms.sample_every) if terms.sample_every > 0 else 0
    by_time = {} if terms.keep > 0 else {"save_every_minutes": 0.0}  # where all are kept, more of them fill the disk
    return {
        "save_every_steps": terms.steps(terms.save_every) if terms.save_every > 0 else 0,
        "keep_last": min(terms.keep, KEEP_ALL) if terms.keep > 0 else KEEP_ALL,
        "evaluate_every_steps": sample_every,
        "sample_every_steps": sample_every,
        "sample_prompts": list(terms.prompts),
        "sample_system": terms.system,
        "sample_max_new_tokens": terms.max_new_tokens,
        **by_time,
    }


def _remarks(terms: Terms) -> dict[str, str]:
    """What a reader should know of a value that is not simply XTuner's."""
    remarks = {
        "save_every": _in_steps(terms.save_every, terms.accumulation),
        "sample_every": _in_steps(terms.sample_every, terms.accumulation),
        "iterations": _in_steps(terms.iterations or 0, terms.accumulation),
        "warmup_iterations": _in_steps(terms.warmup_iterations, terms.accumulation),
    }
    if terms.pack and terms.task == "sft":
        remarks["batch"] = f"examples; XTuner counts packs of {terms.max_length} tokens"
        remarks["pack"] = "packed examples do not see each other; XTuner's do, but for use_varlen_attn"
    if terms.sequence_parallel > 1:
        split = terms.sequence_parallel
        remarks["accumulation"] = (
            f"{terms.accumulation} / {split}: XTuner splits each sequence over {split} GPUs, here one device takes it"
        )
    if terms.keep < 0:
        remarks["keep"] = "XTuner: -1, all; so none is saved by time"
    if any(source.rows for source in terms.sources):
        remarks["sources"] = "XTuner draws its max_dataset_length rows once; here each epoch takes the next ones"
    return {PATHS[name]: remark for name, remark in remarks.items() if remark}


def _in_steps(iterations: int, accumulation: int) -> str:
    """`XTuner: 500 micro-batches; 500 / 16 in a step = 31.25, so 31`."""
    if iterations <= 0 or accumulation == 1:
        return ""
    exact = iterations / accumulation
    rounded = max(1, round(exact))
    end = f"= {rounded}" if exact == rounded else f"= {exact:.4g}, so {rounded}"
    return f"XTuner: {iterations} micro-batches; {iterations} / {accumulation} in a step {end}"
