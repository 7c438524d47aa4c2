"""The five DeepSpeed presets, by XTuner's names; what they hold is composed here."""

from typing import Any

from studio.errors import ConfigError, Problem

_CPU = {"device": "cpu", "pin_memory": True}
_STAGES: dict[str, dict[str, Any]] = {
    "deepspeed_zero1": {"stage": 1},
    "deepspeed_zero2": {"stage": 2},
    "deepspeed_zero2_offload": {"stage": 2, "offload_optimizer": _CPU},
    "deepspeed_zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "deepspeed_zero3_offload": {
        "stage": 3,
        "offload_optimizer": _CPU,
        "offload_param": _CPU,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
DEEPSPEED_NAMES = tuple(_STAGES)


def deepspeed_preset(name: str) -> dict[str, Any]:
    """The JSON values of a preset; "auto" is filled in from the config of a run. Raises ConfigError."""
    if name not in _STAGES:
        raise ConfigError([Problem("deepspeed", f"there is no preset {name!r}", ", ".join(DEEPSPEED_NAMES))], "catalog")
    return {
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**_STAGES[name], "overlap_comm": True},
        "fp16": {"enabled": "auto", "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
    }
