"""DeepSpeed's presets as the JSON files that XTuner lists beside its configs."""

from typing import Any

from studio.config.zero import PRESETS
from studio.errors import ConfigError, Problem

PREFIX = "deepspeed_"
DEEPSPEED_NAMES = tuple(f"{PREFIX}{name}" for name in PRESETS)


def deepspeed_preset(name: str) -> dict[str, Any]:
    """The JSON values of a preset; "auto" is filled in from the config of a run. Raises ConfigError."""
    if name not in DEEPSPEED_NAMES:
        raise ConfigError([Problem("deepspeed", f"there is no preset {name!r}", ", ".join(DEEPSPEED_NAMES))], "catalog")
    return {
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**PRESETS[name.removeprefix(PREFIX)], "overlap_comm": True},
        "fp16": {"enabled": "auto", "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
    }
