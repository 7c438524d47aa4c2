"""The `measure` verb: a real step or two of a config, to know its seconds and its memory before a run is started."""

from typing import Any

import torch

from studio.config.schema import RunConfig, parse_config
from studio.engine import adapters, devices
from studio.engine.batches import examples_from, load_corpus
from studio.engine.job import JobContext
from studio.engine.loop import Trainer
from studio.engine.models.load import load_base
from studio.engine.tokenize import reporting
from studio.models import require

QUICK_SECONDS = 30.0  # the first step warms up; a second one is taken when that costs little


def run(job: JobContext) -> dict[str, Any]:
    """Args: config. The result has seconds_per_step, tokens_per_second and memory_bytes, the peak of this process."""
    config = parse_config(job.args["config"])
    devices.set_threads()
    devices.seed_all(config.train.seed)
    trainer, steps = _prepare(job, config)
    job.phase("measuring a step", total=2, unit="steps")
    result = trainer.step(next(steps), 1)
    job.progress(1)
    job.check_stop()
    if result.seconds < QUICK_SECONDS:
        result = trainer.step(next(steps), 2)
    memory = devices.memory_metric(next(trainer.model.parameters()).device)
    return {
        "seconds_per_step": result.seconds,
        "tokens_per_second": result.num_tokens / result.seconds,
        "memory_bytes": int(next(iter(memory.values()))),
    }


def _prepare(job: JobContext, config: RunConfig) -> tuple[Trainer, Any]:
    """The trainer of the config and its steps' examples. Raises StudioError, StopRequested."""
    device = devices.pick_device()
    dtype = devices.pick_dtype(config.model.dtype, device)
    job.phase("loading model")
    loaded = load_base(
        require(config.model.base),
        dtype=torch.float32 if config.method == "full" else dtype,
        attention=config.model.attention,
        bits=4 if config.method == "qlora" else 0,
        device=device,
        template=config.data.template,
    )
    job.check_stop()
    job.phase("tokenising", unit="rows")
    corpus = load_corpus(job.folder, config, loaded.template, loaded.tokenizer, reporting(job))
    model = adapters.attach(loaded, config)
    num_steps = max(2, config.train.num_steps or 2)
    return Trainer(model, config, dtype, num_steps, loaded.pad_id), examples_from(corpus, config, 0)
