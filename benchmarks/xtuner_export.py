"""Exported configs held against XTuner itself: loaded by mmengine, built as far as a CPU goes, compared with its own.

    .venv/bin/python benchmarks/xtuner_export.py write FOLDER     # every built-in config that XTuner has, as its .py
    XTUNER_PYTHON benchmarks/xtuner_export.py hold FOLDER         # in an environment with xtuner 0.1.23 and mmengine

`hold` needs no model and no network. Built are the optimizer with its wrapper, on one layer, and the schedules; the
learning rate is compared at every micro-batch of a run of EPOCH_LENGTH micro-batches an epoch. Everything that a config
names (datasets, maps, templates, hooks, LoRA, quantisation, loops) is imported. What is compared otherwise are the
settings in COMPARED.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

EPOCH_LENGTH = 40
MAX_MICRO_BATCHES = 200
COMPARED = (
    "tokenizer", "model.llm.pretrained_model_name_or_path", "model.llm.trust_remote_code", "model.lora",
    "model.llm.quantization_config", "train_dataloader.batch_size", "train_dataloader.dataset.type",
    "train_dataloader.dataset.dataset_map_fn", "train_dataloader.dataset.template_map_fn",
    "train_dataloader.dataset.max_length", "train_dataloader.dataset.pack_to_max_length", "optim_wrapper",
    "train_cfg",
)  # fmt: skip


def write(folder: Path) -> None:
    """Export what can be exported of the built-in configs. Prints how many."""
    from studio.config import catalog
    from studio.config.xtuner.exporting import export_file
    from studio.errors import ConfigError

    folder.mkdir(parents=True, exist_ok=True)
    names, others = [], Counter()
    for name in catalog.listed(""):
        try:
            text = export_file(catalog.preset(name), folder / f"{name}.py").text
        except ConfigError as error:
            others[error.problems[0].path] += 1
            continue
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        names.append(name)
    print(f"{len(names)} written to {folder}; not sft, or no config of a run: {dict(others)}")


def hold(folder: Path) -> None:
    """Load and build each file beside XTuner's own of that name, and count what differs."""
    from mmengine.config import Config
    from xtuner.configs import cfgs_name_path

    built, same_rates, differences, example = 0, 0, Counter[tuple[str, str, str]](), {}
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem in cfgs_name_path)
    for name in names:
        ours, theirs = Config.fromfile(str(folder / f"{name}.py")), Config.fromfile(cfgs_name_path[name])
        settings = plain(ours._cfg_dict)
        rates = learning_rates(ours)
        built += 1
        if theirs.get("optim_wrapper") is None:  # written for transformers' trainer
            continue
        same_rates += close(rates, learning_rates(theirs))
        wanted = plain(theirs._cfg_dict)
        for path in COMPARED:
            for key, left, right in differing(at(wanted, path), at(settings, path), path):
                differences[key, left, right] += 1
                example.setdefault((key, left, right), name)
    print(f"{built} of {len(names)} loaded and built; learning rates alike in {same_rates}")
    for (key, left, right), count in differences.most_common():
        print(f"{count:4} {key}: {left} there, {right} in the export, as in {example[key, left, right]}")


def learning_rates(config: Any) -> list[float]:
    """The rate before each micro-batch, of an optimizer and schedules as mmengine builds them."""
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    if config.get("optim_wrapper") is None:
        return []
    wrapper = dict(config.optim_wrapper) | {"type": "OptimWrapper"}  # AmpOptimWrapper needs a GPU
    [wrapper.pop(key, None) for key in ("loss_scale", "dtype")]
    optimizer = build_optim_wrapper(torch.nn.Linear(1, 1), wrapper).optimizer
    schedules = []
    given = config.param_scheduler
    for part in given if isinstance(given, list) else [given]:
        part = dict(part)
        kind = part.pop("type")
        kind = PARAM_SCHEDULERS.get(kind) if isinstance(kind, str) else kind
        is_epochs = part.pop("convert_to_iter_based", False)
        settings = {"optimizer": optimizer, **part}
        schedules.append(
            kind.build_iter_from_epoch(**settings, epoch_length=EPOCH_LENGTH) if is_epochs else kind(**settings)
        )
    rates = []
    for _ in range(MAX_MICRO_BATCHES):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        [schedule.step() for schedule in schedules]
    return rates


def plain(value: Any) -> Any:
    """Imported things by their names; importing each."""
    if isinstance(value, dict):
        return {key: plain(value.get(key)) for key in value}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    value = value.build() if hasattr(value, "build") and "Lazy" in type(value).__name__ else value
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"


def at(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def differing(left: Any, right: Any, path: str) -> list[tuple[str, str, str]]:
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [each for key in keys for each in differing(left.get(key), right.get(key), f"{path}.{key}")]
    alike = left == right or (isinstance(left, float) and isinstance(right, float) and close([left], [right]))
    return [] if alike else [(path, str(left)[:60], str(right)[:60])]


def close(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        abs(a - b) <= 1e-9 * max(abs(a), abs(b)) + 1e-16 for a, b in zip(left, right, strict=True)
    )


if __name__ == "__main__":
    {"write": write, "hold": hold}[sys.argv[1]](Path(sys.argv[2]))
