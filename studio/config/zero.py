"""DeepSpeed's configuration of a run: a preset or a file of the person's own, with what the run itself decides put in.

The presets are those of XTuner by the same names; see https://www.deepspeed.ai/docs/config-json for every key.
"""

import json
from typing import Any

from studio.config.schema import VIRTUAL_METHODS, ZERO_PRESETS, RunConfig
from studio.errors import ConfigError, Problem, StudioError
from studio.paths import typed_path

GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "zero3": {"stage": 3, **GATHER},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        **GATHER,
    },
}
# What a run decides by itself, and a file of one's own must leave to it: the value would be silently another.
OWN_KEYS = ("optimizer", "scheduler", "train_batch_size")
SECTIONS = ("zero_optimization", "bf16", "fp16")
AUTO = "auto"  # in files made for transformers: the run decides
# DeepSpeed lays out two buckets for gradients, of 500 million numbers each unless it is told otherwise: gigabytes, even
# for an adapter of a few million weights.
LARGEST_BUCKET = 50_000_000


def chosen(config: RunConfig) -> dict[str, Any]:
    """The preset's or file's settings, as written.

    Raises ConfigError for a file that is no DeepSpeed JSON, and for stage 3 where the base is read outside its layers.
    """
    name = config.distributed.deepspeed
    found = {"zero_optimization": {**PRESETS[name], "overlap_comm": True}} if name in PRESETS else _read(name)
    if stage_of(found) == 3 and config.method in VIRTUAL_METHODS:
        problem = f"{name} shares out the weights, which {config.method} must see whole"
        raise _problem(problem, "zero1, zero2, zero2_offload, or the strategy ddp")
    return found


def _read(name: str) -> dict[str, Any]:
    """A person's own settings. Raises ConfigError."""
    try:
        values = json.loads(typed_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, StudioError) as error:
        raise _problem(f"cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise _problem(f"holds {type(values).__name__}, not settings by name")
    if taken := [key for key in OWN_KEYS if key in values]:
        raise _problem(f"{name} sets {', '.join(taken)}; those come from the run's config: take them out of the file")
    if odd := [key for key in SECTIONS if not isinstance(values.get(key, {}), dict)]:
        raise _problem(f"{name} has {', '.join(odd)} without settings by name", '{"stage": 2}, {"enabled": true}')
    size = values.get("zero_optimization", {}).get("reduce_bucket_size", AUTO)
    if size != AUTO and not (isinstance(size, int | float) and 1 <= size < 2**63):
        raise _problem(f"{name} has zero_optimization.reduce_bucket_size {size!r}", f"a whole number, {AUTO}")
    stage = stage_of(values)
    if stage not in (0, 1, 2, 3):
        raise _problem(f"{name} has zero_optimization.stage {stage!r}", "0, 1, 2, 3")
    return values


def stage_of(values: dict[str, Any]) -> Any:
    """ZeRO's stage in DeepSpeed's settings; 0 where nothing is shared out."""
    return values.get("zero_optimization", {}).get("stage", 0)


def complete(values: dict[str, Any], config: RunConfig, dtype: str, num_learning: int) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`. `dtype`: float32, bfloat16 or float16, the run's arithmetic.

    `num_learning`: weights that learn, which no bucket for gradients need be larger than.

    The trainer counts gradient accumulation itself and sums the loss over every process's tokens, so DeepSpeed is told
    of single passes. An adapter stays in float32 under autocast, as in one process; a whole model's weights are kept in
    bfloat16 with float32 masters, for whoever shards a whole model is short of memory.
    """
    train = config.train
    fixed = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    found = {**values, **fixed}
    if stage_of(values):
        size = bucket_size(values, num_learning)
        found["zero_optimization"] = {**values["zero_optimization"], "reduce_bucket_size": size}
    for name, here in (("bf16", dtype == "bfloat16" and config.method == "full"), ("fp16", dtype == "float16")):
        own = values.get(name, {})
        wanted = own.get("enabled", AUTO)
        found[name] = {**own, "enabled": here if wanted == AUTO else bool(wanted)}
    found["fp16"].setdefault("initial_scale_power", 16)
    return found


def bucket_size(values: dict[str, Any], num_learning: int) -> int:
    """Numbers in a bucket for gradients."""
    size = values["zero_optimization"].get("reduce_bucket_size", AUTO)
    return min(num_learning, LARGEST_BUCKET) if size == AUTO else int(size)


def offloads(values: dict[str, Any], what: str) -> bool:
    """Whether `what` ("optimizer", "param") waits in main memory or on a disk, and not on the device."""
    section = values.get("zero_optimization", {}).get(f"offload_{what}")
    return isinstance(section, dict) and section.get("device", "cpu") != "none"


def _problem(what: str, allowed: str = "") -> ConfigError:
    return ConfigError([Problem("distributed.deepspeed", what, allowed or ", ".join(ZERO_PRESETS))])
