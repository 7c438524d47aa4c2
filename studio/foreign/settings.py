"""The few facts of an XTuner config that its weights need: base, adapter, accumulation, template.

A checkpoint carries its config as text (`meta.cfg`), and older ones lie beside their `.py`. It is read as every config
of XTuner is (`studio.config.xtuner.reading`), and never run; what only running it would tell stays unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.config.schema import ADAPTER_METHODS, RunConfig
from studio.config.xtuner.mapping import last
from studio.config.xtuner.reading import SCALARS, TUPLES, read_file, read_text
from studio.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Settings:
    """What is known; empty or zero where the config does not say it in a way that can be read."""

    base: str = ""
    lora: dict[str, Any] = field(default_factory=dict)
    is_quantized: bool = False
    accumulation: int = 0
    template: str = ""
    max_length: int = 0
    learning_rate: float = 0.0


def read_settings(config: str | Path) -> Settings:
    """Of a text, or of a file and those beside it that it inherits from.

    Raises CheckpointError for what is no Python, is not there, or is unreasonably long or deep.
    """
    try:
        return _settings((read_file(config) if isinstance(config, Path) else read_text(config)).names)
    except ConfigError as error:
        reason = "; ".join(problem.message for problem in error.problems)
        raise CheckpointError(f"The config {reason}.", "Give the config that XTuner dumped.") from error


def settings_of(config: RunConfig) -> Settings:
    """The same facts of a config of ours."""
    lora = {"r": config.lora.rank, "lora_alpha": config.lora.alpha, "lora_dropout": config.lora.dropout}
    return Settings(
        base=config.model.base,
        lora=lora if config.method in ADAPTER_METHODS else {},
        is_quantized=config.method == "qlora",
        accumulation=config.train.gradient_accumulation_steps,
        template=config.data.template,
        max_length=config.data.max_length,
        learning_rate=config.train.learning_rate,
    )


def _settings(names: Mapping[str, Any]) -> Settings:
    model = _dict(names.get("model"))
    llm, lora = _dict(model.get("llm")), _dict(model.get("lora"))
    counts = (
        _dict(names.get("optim_wrapper")).get("accumulative_counts"),
        _dict(names.get("strategy")).get("gradient_accumulation_steps"),  # where a run with --deepspeed keeps it
        names.get("accumulative_counts"),
    )
    base = llm.get("pretrained_model_name_or_path"), names.get("pretrained_model_name_or_path")
    quantization = _dict(llm.get("quantization_config"))
    return Settings(
        base=_first(str, *base) or "",
        lora={name: value for name, value in lora.items() if _is_plain(value) and name != "type"},
        is_quantized=any(quantization.get(name) is True for name in ("load_in_4bit", "load_in_8bit")),
        accumulation=_first(int, *counts) or 0,
        template=last(names.get("prompt_template")),
        max_length=_first(int, names.get("max_length")) or 0,
        learning_rate=_first(float, names.get("lr")) or 0.0,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any) -> bool:
    """Whether a value was read: a scalar, or a list of such."""
    return isinstance(value, SCALARS) or (isinstance(value, TUPLES) and all(isinstance(one, SCALARS) for one in value))


def _first(kind: type, *values: Any) -> Any:
    """The first value of that kind; whole numbers count as real ones."""
    kinds = (float, int) if kind is float else (kind,)
    return next((value for value in values if isinstance(value, kinds) and not isinstance(value, bool)), None)
