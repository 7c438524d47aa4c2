"""The `measure` verb: a real step or two of a config, to know its seconds and its memory before a run is started."""

from typing import Any

from studio.config.schema import parse_config
from studio.engine import devices
from studio.engine.batches import examples_from
from studio.engine.job import JobContext
from studio.engine.prepare import prepare

QUICK_SECONDS = 30.0  # the first step warms up; a second one is taken when that costs little


def run(job: JobContext) -> dict[str, Any]:
    """Args: config. The result has seconds_per_step, tokens_per_second and memory_bytes, the peak of this process."""
    config = parse_config(job.args["config"])
    devices.set_threads()
    devices.seed_all(config.train.seed)
    ready = prepare(job, config)
    trainer, steps = ready.trainer, examples_from(ready.corpus, config, 0)
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
