"""XTuner's checkpoints, `iter_N.pth` as file or DeepSpeed folder: what is in them, and the weights by our names."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from studio.config.schema import EVERY_ROW, RunConfig, TemplateName, parse_config
from studio.errors import CheckpointError
from studio.foreign.deepspeed_folder import DeepSpeedFolder, Weight, whole
from studio.foreign.pickles import ITEM_BYTES, NumberArray, StandIn, StoredTensor
from studio.foreign.settings import Settings, read_settings
from studio.foreign.torch_file import open_dictionary

LLM_PREFIX = "llm."
LORA_KEY = re.compile(r"\.lora_(?:embedding_)?[AB]\.")
ADAPTER_NAME = re.compile(r"(\.(?:lora_[AB]|lora_embedding_[AB]|modules_to_save))\.default(?=\.|$)")
MAGNITUDE = re.compile(r"(\.lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")  # DoRA's, which PEFT saves so short
FILE_NUMBER = re.compile(r"(?:iter|epoch)_(\d+)")
MAX_RANK = 1024
MAX_LISTED = 1000
UNKNOWN_DATA = "unknown"
"""Stands for the datasets of a run that was trained elsewhere."""


@dataclass(frozen=True)
class XTunerCheckpoint:
    """A checkpoint that was opened and not read yet.

    `iteration` counts micro-batches, as XTuner does; `step` counts optimizer updates, 0 where nothing tells. `weights`
    are those of the language model, named as PEFT saves an adapter, or transformers a model. `others` are the names of
    further weights: a projector, a vision tower, a value head.
    """

    path: Path
    layout: str
    iteration: int
    step: int
    settings: Settings
    meta: dict[str, Any]
    content: dict[str, Any]
    weights: dict[str, Weight]
    others: tuple[str, ...] = ()
    zero_stage: int = 0
    num_ranks: int = 1
    file_bytes: int = 0
    parts: tuple[str, ...] = field(default_factory=tuple)

    @cached_property
    def is_adapter(self) -> bool:
        return any(LORA_KEY.search(name) for name in self.weights)

    @property
    def method(self) -> str:
        """full, lora or qlora."""
        if not self.is_adapter:
            return "full"
        return "qlora" if self.settings.is_quantized else "lora"

    @property
    def name(self) -> str:
        """The folder that it lies in, which XTuner names after the config."""
        return self.path.resolve().parent.name

    def with_settings(self, settings: Settings) -> "XTunerCheckpoint":
        """The same with the facts of another config, where its own has none. Steps are counted again."""
        merged = replace(
            self.settings, **{name: value for name, value in vars(settings).items() if not getattr(self.settings, name)}
        )
        return replace(self, settings=merged, step=self.step or _steps(self.iteration, merged))

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's settings of the adapter: rank and layers as the weights have them, the rest as the config says.

        Raises CheckpointError when nothing says the adapter's alpha.
        """
        rank = self._rank()
        lora = self.settings.lora
        if not isinstance(lora.get("lora_alpha"), int | float):
            raise CheckpointError(
                f"{self.path.name} does not say the lora_alpha of its adapter.",
                "Give the config that it was trained with (the .py in its work folder).",
            )
        saved = sorted({_module(name) for name in self.weights if ".modules_to_save" in name})
        return {
            "peft_type": "LORA",
            "task_type": str(lora.get("task_type") or "CAUSAL_LM"),
            "r": rank,
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": float(lora.get("lora_dropout") or 0.0),
            "bias": str(lora.get("bias") or "none"),
            "target_modules": sorted({_module(name) for name in self.weights if LORA_KEY.search(name)}),
            "modules_to_save": saved or None,
            "use_rslora": bool(lora.get("use_rslora")),
            "use_dora": any("lora_magnitude_vector" in name for name in self.weights),
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _rank(self) -> int:
        ranks = {
            weight.shape[0 if ".lora_A." in name else -1]
            for name, weight in self.weights.items()
            if LORA_KEY.search(name) and "embedding" not in name
        }
        if len(ranks) != 1 or not 1 <= min(ranks) <= MAX_RANK:
            raise CheckpointError(f"The adapter in {self.path.name} has ranks {sorted(ranks)}.", "Allowed: one rank.")
        return ranks.pop()

    def run_config(self, base: str, name: str) -> RunConfig:
        """The run that it comes from in our terms, as far as the checkpoint tells; its datasets are not known here."""
        lora = {}
        if self.is_adapter:
            found = self.adapter_config()
            lora = {"rank": found["r"], "alpha": max(1, round(found["lora_alpha"])), "dropout": found["lora_dropout"]}
            lora["target_modules"] = ",".join(found["target_modules"])
            lora |= {"dora": found["use_dora"], "rslora": found["use_rslora"]}
        train = {"num_epochs": None, "num_steps": max(1, self.step), "warmup_steps": 0}
        train |= {"gradient_accumulation_steps": self.settings.accumulation or 1, "micro_batch_size": 1}
        train |= {"learning_rate": self.settings.learning_rate} if self.settings.learning_rate else {}
        data = {"sources": {UNKNOWN_DATA: EVERY_ROW}, "template": self.template}
        data |= {"max_length": self.settings.max_length} if self.settings.max_length else {}
        values = {"name": name, "method": self.method, "model": {"base": base}, "lora": lora, "data": data}
        return parse_config(values | {"train": train}, self.path.name)

    @property
    def template(self) -> str:
        """The named template that it was trained with, where it is one of ours; else empty."""
        return self.settings.template if self.settings.template in get_args(TemplateName) else ""

    def facts(self) -> dict[str, Any]:
        """What there is to know at a glance, as plain values."""
        numbers = Counter(weight.dtype for weight in self.weights.values())
        lora = {"rank": self._rank(), **self.settings.lora} if self.is_adapter else {}
        lora.pop("r", None)
        return {
            "file": str(self.path),
            "layout": self.layout,
            "written by": _writer(self.meta),
            "method": self.method if self.weights else "",
            "iteration": self.iteration,
            "step": self.step,
            "base": self.settings.base,
            "template": self.settings.template,
            "lora": lora,
            "tensors": len(self.weights),
            "parameters": sum(weight.num_elements for weight in self.weights.values()),
            "weight bytes": sum(weight.num_elements * ITEM_BYTES[weight.dtype] for weight in self.weights.values()),
            "number formats": dict(numbers),
            "file bytes": self.file_bytes,
            "other weights": list(self.others),
            "parts": list(self.parts),
            "seed": self.meta.get("seed"),
            "saved at": str(self.meta.get("time") or ""),
            "last loss": self.last_loss(),
        }

    def last_loss(self) -> float | None:
        """The newest training loss in mmengine's history, where it is kept."""
        scalars = _dict(_dict(self.content.get("message_hub")).get("log_scalars"))
        history = scalars.get("train/loss")
        state = history.state if isinstance(history, StandIn) else {}
        values = state.get("_log_history")
        numbers = values.values() if isinstance(values, NumberArray) else []
        return float(numbers[-1]) if numbers and math.isfinite(numbers[-1]) else None


def open_checkpoint(path: Path, config: Path | None = None) -> XTunerCheckpoint:
    """Open an `iter_N.pth`, file or folder; `config` is the `.py` of its config, for what the checkpoint does not say.

    Weights of XTuner's models begin with `llm.`; a plain state dict of a transformers model is taken as it is.
    Raises CheckpointError for something else or damaged, UnsafeFileError for what could run code.
    """
    path = Path(path)
    _require_not_converted(path)
    found = _open_folder(path) if path.is_dir() else _open_file(path)
    return found.with_settings(read_settings(config)) if config else found


def _require_not_converted(path: Path) -> None:
    """A Hugging Face folder is what conversion makes of a checkpoint. Raises CheckpointError for one."""
    if is_checkpoint(path):
        return
    for name, kind, use in (
        ("adapter_config.json", "an adapter", "retune chat --adapter, retune convert merge, or train --continue-from"),
        ("config.json", "a whole model", "retune chat --base, or model.base of a config"),
    ):
        if (path / name).is_file():
            raise CheckpointError(f"{path.name} is {kind} in Hugging Face's format already.", f"Use it: {use}.")


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like one: a `.pth`, or a folder with files of DeepSpeed."""
    return path.suffix in (".pth", ".pt") or (path.is_dir() and any(path.glob("*model_states.pt")))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a work folder of XTuner, or in the work folders that lie in it, each folder's newest first."""
    found = [
        path
        for pattern in ("*.pth", "*/*.pth")
        for path in islice(folder.glob(pattern), MAX_LISTED)
        if FILE_NUMBER.fullmatch(path.stem) and is_checkpoint(path)
    ]
    return sorted(found, key=lambda path: (str(path.parent), -int(FILE_NUMBER.fullmatch(path.stem)[1])))  # type: ignore[index]


def _open_file(path: Path) -> XTunerCheckpoint:
    content = open_dictionary(path).content
    state = content.get("state_dict", content.get("model", content))
    tensors = state if isinstance(state, dict) else {}
    weights = {str(name): whole(tensor) for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    return _checkpoint(path, "file", content, weights, path.stat().st_size)


def _open_folder(path: Path) -> XTunerCheckpoint:
    folder = DeepSpeedFolder(path)
    size = sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    found = _checkpoint(path, f"DeepSpeed, ZeRO {folder.stage}", folder.content, folder.weights, size)
    steps = folder.content.get("global_steps")
    step = steps if isinstance(steps, int) and steps > 0 else found.step
    return replace(found, step=step, zero_stage=folder.stage, num_ranks=folder.world_size)


def _checkpoint(
    path: Path, layout: str, content: dict[str, Any], weights: Mapping[str, Weight], size: int
) -> XTunerCheckpoint:
    if not weights:
        raise CheckpointError(f"{path.name} holds no weights.", "Give an iter_N.pth of XTuner, or a state dict.")
    meta = _dict(content.get("meta"))
    text = meta.get("cfg")
    settings = read_settings(text) if isinstance(text, str) else Settings()
    number = FILE_NUMBER.search(path.name)
    counted = meta.get("iter")
    iteration = counted if isinstance(counted, int) else int(number[1]) if number else 0
    ours = dict(_language_model(weights))
    others = tuple(sorted({name.partition(".")[0] for name in weights if not _is_ours(name, weights)}))
    return XTunerCheckpoint(
        path=path, layout=layout, iteration=iteration, step=_steps(iteration, settings), settings=settings, meta=meta,
        content=content, weights=ours, others=others, file_bytes=size, parts=tuple(map(str, content)),
    )  # fmt: skip


def _language_model(weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    for name, weight in weights.items():
        if _is_ours(name, weights):
            yield MAGNITUDE.sub(r"\1", ADAPTER_NAME.sub(r"\1", name.removeprefix(LLM_PREFIX))), weight


def _is_ours(name: str, weights: Mapping[str, Weight]) -> bool:
    """With `llm.` in front where any name has it; a plain state dict has it nowhere."""
    return name.startswith(LLM_PREFIX) or not any(each.startswith(LLM_PREFIX) for each in weights)


def _steps(iteration: int, settings: Settings) -> int:
    """Optimizer updates in so many micro-batches; the last one may be of fewer."""
    return -(-iteration // settings.accumulation) if settings.accumulation else 0


def _module(name: str) -> str:
    """`q_proj` of `….q_proj.lora_A.weight`."""
    return re.split(r"\.(?:lora_|modules_to_save)", name)[0].rpartition(".")[2]


def _writer(meta: dict[str, Any]) -> str:
    version = meta.get("mmengine_version") or meta.get("mmengine")
    return f"mmengine {str(version)[:40]}" if version else ""


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
