"""What XTuner's config says, in XTuner's terms: from the names that a file sets to Terms.

Nothing is guessed: what has no reading here is listed with its line. What a run cannot be made without (base model,
data) is an error when it cannot be read.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, get_args

from studio.config.catalog.recipes import RECIPES, system_text
from studio.config.schema import TemplateName
from studio.config.xtuner.reading import Reading, Ref, Unread
from studio.config.xtuner.terms import NO_TEMPLATE, Source, Terms
from studio.config.zero import PRESETS
from studio.errors import ConfigError, Problem
from studio.paths import slugify

TASKS = {"SupervisedFinetune": "sft", "DPO": "dpo", "ORPO": "orpo", "RewardModel": "reward", "LLaVAModel": "vision"}
INTERNVL = "InternVL_V1_5"
OPTIMIZERS = {
    "AdamW": "adamw", "AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "paged_adamw_8bit", "adamw_torch": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
KNOWN_SOURCES = {
    source.source: source.name for recipe in RECIPES.values() for source in recipe.sources
}  # the names that the built-in configs have for data
MAPS = {"crime_kg_assitant": "crime_kg_assitan"}
# Settings of a part that are not taken over, with the values at which they change nothing. Where a part has others
# than these and those that are read, they are listed too.
LORA_AT_REST = {
    "bias": "none", "modules_to_save": None, "rank_pattern": None, "alpha_pattern": None, "init_lora_weights": True,
    "fan_in_fan_out": False, "inference_mode": False, "layers_to_transform": None, "layers_pattern": None,
}  # fmt: skip
LORA_READ = ("type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")
OPTIMIZER_AT_REST = {"eps": 1e-8, "amsgrad": False, "maximize": False, "fused": None, "foreach": None}
OPTIMIZER_READ = ("type", "lr", "betas", "weight_decay")
WRAPPER_READ = ("type", "optimizer", "clip_grad", "accumulative_counts", "dtype", "loss_scale")


@dataclass
class Mapped:
    """Terms, what is otherwise here (`notes`), and what could not be read (`unread`)."""

    terms: Terms
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def mapped(reading: Reading, source: str) -> Mapped:
    """The terms of a config that was read. Raises ConfigError where a run cannot be made of it."""
    return _Mapper(reading, source).run()


def dotted(value: Any) -> str:
    """The dotted name of an imported thing; in a dumped config it is a text."""
    if isinstance(value, Ref):
        return value.name
    return value if isinstance(value, str) else ""


def last(value: Any) -> str:
    """AdamW of torch.optim.AdamW; "" for what is no name."""
    return dotted(value).rpartition(".")[2]


class _Mapper:
    def __init__(self, reading: Reading, source: str) -> None:
        self._names, self._lines, self._source = reading.names, reading.lines, source
        self._notes: list[str] = []
        self._unread = [str(each) for each in reading.unread]

    def run(self) -> Mapped:
        """Each part of the config in turn; later parts know what earlier ones found."""
        if not isinstance(self._names.get("model"), dict):
            raise self._missing("model", "sets no model: it is no XTuner config, or its model cannot be read")
        values: dict[str, Any] = {"method": "full"}
        values |= self._model()
        values |= self._trainer_arguments() if "training_args" in self._names else self._training()
        values |= self._data(values["task"])
        values |= self._record()
        self._check_rest()
        return Mapped(Terms(**values), self._notes, list(dict.fromkeys(self._unread)))

    # reading with care

    def _missing(self, path: str, message: str) -> ConfigError:
        found = self._names.get(path.partition(".")[0])
        reasons = [str(found)] if isinstance(found, Unread) else []
        listed = "; ".join([*reasons, *self._unread[:5]])
        return ConfigError([Problem(path, message + (f" ({listed})" if listed else ""))], self._source)

    def _take(self, owner: Any, key: str, kind: Any, default: Any) -> Any:
        """A value of the kind, the default where it is not set; anything else is listed and the default stands."""
        value = owner.get(key, default) if isinstance(owner, dict) else default
        if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
        if value is not None and value is not default:
            self._list(key, value)
        return default

    def _number(self, owner: Any, key: str, default: float) -> float:
        return self._take(owner, key, (int, float), default)

    def _list(self, key: str, value: Any) -> None:
        """Remember that a setting was not taken over."""
        if isinstance(value, Unread):
            self._unread.append(f"{value} (for {key})")
        else:
            line = self._lines.get(key)
            where = f"{self._source}, line {line}" if line else self._source
            self._unread.append(f"{where}: {key} is {_short(value)}, which has no reading here")

    def _list_others(self, part: dict[str, Any], read: Sequence[str], at_rest: dict[str, Any]) -> None:
        """Remember the settings of a part that are not among those `read`, unless they change nothing.

        PEFT writes patterns that nobody gave as empty dictionaries.
        """
        for key, value in part.items():
            if key not in read and value not in (None, {}, []) and (key not in at_rest or value != at_rest[key]):
                self._list(key, value)

    # the model

    def _model(self) -> dict[str, Any]:
        model = self._names["model"]
        kind = last(model.get("type"))
        task = "vision" if kind == INTERNVL else TASKS.get(kind, "sft" if kind == "from_pretrained" else "")
        if not task:
            raise self._missing(
                "model.type", f"trains {kind or 'something that cannot be read'}; known: {', '.join(TASKS)}"
            )
        llm = model if kind in ("from_pretrained", INTERNVL) else model.get("llm", model.get("reward_model", {}))
        values = {"task": task, "base": self._base(llm), **self._quantisation(model, llm, task)}
        self._says_of_model(model, llm, task)
        return values | self._beginning(model)

    def _beginning(self, model: dict[str, Any]) -> dict[str, Any]:
        """The weights that a run begins with: `model.peft_model`, or `load_from` of a config that does not resume."""
        found = model.get("peft_model") or (None if self._names.get("resume") else self._names.get("load_from"))
        if isinstance(found, str) and found:
            return {"continue_from": found}
        if found is not None:
            self._list("peft_model" if model.get("peft_model") else "load_from", found)
        return {}

    def _base(self, llm: Any) -> str:
        for key in ("pretrained_model_name_or_path", "model_path"):
            if isinstance(llm, dict) and isinstance(llm.get(key), str) and llm[key]:
                return llm[key]
        raise self._missing("model.llm", "does not say which base model it trains")

    def _quantisation(self, model: dict[str, Any], llm: dict[str, Any], task: str) -> dict[str, Any]:
        config = llm.get("quantization_config") or {}
        four_bit = (
            bool(isinstance(config, dict) and config.get("load_in_4bit")) or model.get("quantization_llm") is True
        )
        eight_bit = bool(isinstance(config, dict) and config.get("load_in_8bit")) or llm.get("load_in_8bit") is True
        lora = model.get("lora") or model.get("llm_lora") or self._names.get("lora")
        if isinstance(lora, Unread) or isinstance(config, Unread):
            raise self._missing("model.lora", "cannot be read, and whether a run is LoRA or full depends on it")
        if eight_bit:
            self._notes.append("XTuner keeps the base in 8 bits (LLM.int8); here it is kept in 4 (NF4)")
        if not isinstance(lora, dict):
            if four_bit and task == "sft":
                raise self._missing("model.lora", "has a quantised base and no LoRA: nothing could learn")
            return {"method": "full"}
        return {"method": "qlora" if four_bit or eight_bit else "lora", **self._lora(lora)}

    def _lora(self, lora: dict[str, Any]) -> dict[str, Any]:
        targets = lora.get("target_modules")
        if isinstance(targets, str):
            targets = [] if targets in ("all-linear", "all") else [targets]
        if targets is not None and not (isinstance(targets, list | tuple) and all(isinstance(t, str) for t in targets)):
            self._list("target_modules", targets)
            targets = None
        self._list_others(lora, LORA_READ, LORA_AT_REST)
        return {
            "dora": self._take(lora, "use_dora", bool, False), "rslora": self._take(lora, "use_rslora", bool, False),
            "rank": self._take(lora, "r", int, 8), "alpha": self._take(lora, "lora_alpha", int, 8),
            "dropout": float(self._number(lora, "lora_dropout", 0.0)), "targets": tuple(targets or ()),
        }  # fmt: skip

    def _says_of_model(self, model: dict[str, Any], llm: dict[str, Any], task: str) -> None:
        if model.get("pretrained_pth"):
            self._list("pretrained_pth", model["pretrained_pth"])
        if model.get("max_position_embeddings"):
            self._list("max_position_embeddings", model["max_position_embeddings"])
        if llm.get("attn_implementation"):
            self._notes.append(
                f"attention: XTuner {llm['attn_implementation']}; here auto takes the fastest that works"
            )
        if task != "sft":
            self._notes.append(f"task {task} can be read and shown, and not be trained yet")

    # the optimizer

    def _training(self) -> dict[str, Any]:
        wrapper = self._names.get("optim_wrapper")
        if not isinstance(wrapper, dict) or not isinstance(wrapper.get("optimizer"), dict):
            raise self._missing("optim_wrapper", "sets no optimizer that can be read")
        optimizer, clip, deepspeed = wrapper["optimizer"], wrapper.get("clip_grad") or {}, self._deepspeed()
        self._list_others(wrapper, WRAPPER_READ, {})
        self._list_others(optimizer, OPTIMIZER_READ, OPTIMIZER_AT_REST)
        rate = self._number(optimizer, "lr", 0.0)
        if rate <= 0:
            raise self._missing("optim_wrapper.optimizer.lr", "sets no learning rate that can be read")
        values: dict[str, Any] = {
            "learning_rate": float(rate),
            "optimizer": self._optimizer(optimizer.get("type")),
            "betas": self._betas(optimizer.get("betas", (0.9, 0.999))),
            # torch's AdamW decays by 0.01 where nothing is said
            "weight_decay": float(self._number(optimizer, "weight_decay", 0.01)),
            "max_norm": float(self._number(clip, "max_norm", self._number(deepspeed, "gradient_clipping", 0.0))),
            "accumulation": self._take(
                wrapper, "accumulative_counts", int, self._take(deepspeed, "gradient_accumulation_steps", int, 1)
            ),
            "deepspeed": self._zero_preset(deepspeed),
            "dtype": self._dtype(wrapper),
            "sequence_parallel": self._sequence_parallel(),
            "checkpointing": self._take(self._names["model"], "use_activation_checkpointing", bool, True),
            "seed": self._take(self._names.get("randomness"), "seed", int, 0),
        }
        return values | self._length() | self._schedule(values["learning_rate"], values["accumulation"])

    def _deepspeed(self) -> dict[str, Any]:
        """The strategy that a config has when it was dumped of a run with --deepspeed; empty for none."""
        found = self._names.get("strategy")
        return found if isinstance(found, dict) and last(found.get("type")) == "DeepSpeedStrategy" else {}

    def _zero_preset(self, strategy: dict[str, Any]) -> str:
        settings = strategy.get("config")
        zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
        if not strategy:
            return ""
        for name, preset in PRESETS.items():
            if zero == {**preset, "overlap_comm": True}:
                self._notes.append(f"DeepSpeed {name}: distributed.processes_per_node says on how many GPUs")
                return name
        self._list("strategy", zero)
        return ""

    def _optimizer(self, kind: Any) -> str:
        found = OPTIMIZERS.get(last(kind))
        if found is None:
            self._list("optimizer", kind)
        return found or "adamw"

    def _betas(self, value: Any) -> tuple[float, float]:
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(each, int | float) for each in value):
            return (float(value[0]), float(value[1]))
        self._list("betas", value)
        return (0.9, 0.999)

    def _dtype(self, wrapper: dict[str, Any]) -> str:
        if last(wrapper.get("type")) == "OptimWrapper":
            return "float32"
        return "bfloat16" if last(wrapper.get("dtype")) == "bfloat16" else "auto"

    def _sequence_parallel(self) -> int:
        split = self._take(self._names, "sequence_parallel_size", int, 1)
        if split > 1:
            self._notes.append(f"XTuner splits each sequence over {split} GPUs; here it must fit on one device")
        return max(1, split)

    def _length(self) -> dict[str, Any]:
        loop = self._names.get("train_cfg")
        epochs = self._take(loop, "max_epochs", (int, float), None)
        iterations = self._take(loop, "max_iters", int, None)
        if epochs is None and iterations is None:
            raise self._missing("train_cfg", "says neither max_epochs nor max_iters that can be read")
        return {"epochs": epochs, "iterations": iterations}

    def _schedule(self, rate: float, accumulation: int) -> dict[str, Any]:
        """LinearLR up, then CosineAnnealingLR, LinearLR or ConstantLR: the one shape that XTuner's configs have."""
        found = self._names.get("param_scheduler")
        parts = found if isinstance(found, list | tuple) else [found]
        values: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0, "final_ratio": 0.0}
        for number, part in enumerate(parts):
            kind = last(part.get("type")) if isinstance(part, dict) else ""
            if kind == "LinearLR" and number == 0 and len(parts) > 1:
                values |= self._warmup(part, accumulation)
            elif kind == "CosineAnnealingLR":
                values |= {"schedule": "cosine", "final_ratio": self._lowest(part, rate)}
            elif kind == "LinearLR":
                values |= {"schedule": "linear", "final_ratio": float(self._number(part, "end_factor", 1.0))}
            elif kind != "ConstantLR" and part is not None:
                self._list("param_scheduler", part if not isinstance(part, dict) else part.get("type"))
        return values

    def _warmup(self, part: dict[str, Any], accumulation: int) -> dict[str, Any]:
        end = self._number(part, "end", 0)
        if part.get("by_epoch", True) is False:
            return {"warmup_ratio": None, "warmup_iterations": int(end)}
        loop = self._length()
        total = loop["epochs"]
        if not total:
            self._list("param_scheduler", end)
            return {"warmup_ratio": 0.0}
        if self._number(part, "start_factor", 1e-5) > 1e-3:
            self._notes.append(f"warm-up begins at {part['start_factor']:g} of the rate in XTuner, at zero here")
        return {"warmup_ratio": min(0.99, round(end / total, 9))}

    def _lowest(self, part: dict[str, Any], rate: float) -> float:
        if isinstance(part.get("eta_min_ratio"), int | float):
            return float(part["eta_min_ratio"])
        return min(1.0, round(self._number(part, "eta_min", 0.0) / rate, 9))

    def _trainer_arguments(self) -> dict[str, Any]:
        """`framework='huggingface'`: the arguments of transformers' Trainer, which counts optimizer steps."""
        given = self._names["training_args"]
        if not isinstance(given, dict):
            raise self._missing("training_args", "cannot be read")
        accumulation = self._take(given, "gradient_accumulation_steps", int, 1)
        warmup, kind = self._take(given, "warmup_steps", int, 0), self._take(given, "lr_scheduler_type", str, "linear")
        if kind not in ("cosine", "linear", "constant"):
            self._list("lr_scheduler_type", kind)
        optimizer = self._take(given, "optim", str, "adamw_torch")
        self._notes.append("XTuner runs this with the Trainer of transformers, which counts steps, not micro-batches")
        if optimizer not in OPTIMIZERS:
            self._notes.append(f"optimizer {optimizer}: AdamW in 32 bits here")
        return {
            "learning_rate": float(self._number(given, "learning_rate", 5e-5)), "accumulation": accumulation,
            "batch": self._take(given, "per_device_train_batch_size", int, 8),
            "weight_decay": float(self._number(given, "weight_decay", 0.0)),
            "max_norm": float(self._number(given, "max_grad_norm", 1.0)),
            "optimizer": OPTIMIZERS.get(optimizer, "adamw"),
            "epochs": self._number(given, "num_train_epochs", 3), "schedule": kind if kind == "linear" else "cosine",
            "warmup_ratio": None if warmup else self._number(given, "warmup_ratio", 0.0),
            "warmup_iterations": warmup * accumulation,
            "save_every": self._take(given, "save_steps", int, 500) * accumulation,
            "keep": self._take(given, "save_total_limit", int, -1), "sample_every": 0,
        }  # fmt: skip

    # the data

    def _data(self, task: str) -> dict[str, Any]:
        loader = self._names.get("train_dataloader")
        dataset = loader.get("dataset") if isinstance(loader, dict) else self._names.get("train_dataset")
        parts = list(self._leaves(dataset))
        if not parts:
            raise self._missing("train_dataloader.dataset", "sets no data that can be read")
        sources = _named([source for part in parts for source in self._sources(part)])
        if not sources:
            raise self._missing("train_dataloader.dataset", "names no data that can be read")
        values: dict[str, Any] = {"sources": sources, **self._layout(parts, task)}
        if isinstance(loader, dict):
            values["batch"] = self._take(loader, "batch_size", int, 1)
        return values

    def _leaves(self, dataset: Any) -> Iterator[dict[str, Any]]:
        if isinstance(dataset, dict) and last(dataset.get("type")) == "ConcatDataset":
            parts = dataset.get("datasets")
            for part in parts if isinstance(parts, list | tuple) else [parts]:
                yield from self._leaves(part)
        elif isinstance(dataset, dict):
            yield dataset
        elif dataset is not None:
            self._list("dataset", dataset)

    def _sources(self, part: dict[str, Any]) -> list[Source]:
        map_name = self._map(part.get("dataset_map_fn"), part)
        rows = self._take(part, "max_dataset_length", int, 0)
        return [
            Source(_name_of(place), place, map_name, split, subset, rows)
            for place, split, subset in self._places(part)
        ]  # fmt: skip

    def _map(self, function: Any, part: dict[str, Any]) -> str:
        """The format that stands for a dataset_map_fn; rows without one are in XTuner's own layout."""
        kind = last(part.get("type"))
        if kind == "MOSSSFTDataset":
            return "moss_sft"
        if kind == "build_preference_dataset" and function is None:
            return "preference"
        if "LLaVADataset" in kind or "InternVL" in kind or "RefCOCO" in kind:
            return "llava"
        if kind == "build_packed_dataset":
            self._list("train_dataset", "tokens that InternEvo made")
            return ""
        if function is None:
            return "xtuner"
        name = last(function)
        if not name.endswith("_map_fn") or isinstance(function, Unread):
            self._list("dataset_map_fn", function)
            return ""
        return MAPS.get(name.removesuffix("_map_fn"), name.removesuffix("_map_fn"))

    def _places(self, part: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """(source, split, subset) of each file or hub's data set that a dataset reads."""
        loaded = part.get("dataset")
        if isinstance(loaded, str):
            yield loaded, "train", ""
        elif isinstance(loaded, dict):
            yield from self._loaded(loaded)
        else:
            where = next(
                (part[key] for key in ("data_file", "data_path", "data_paths", "folder") if part.get(key)), None
            )
            packed = part.get("dataset_cfg")
            where = packed.get("folder") if where is None and isinstance(packed, dict) else where
            for path in where if isinstance(where, list | tuple) else [where]:
                if isinstance(path, str):
                    yield path.removeprefix("./"), "train", ""
                else:
                    self._list("dataset", loaded if loaded is not None else path)

    def _loaded(self, loaded: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        kind = last(loaded.get("type"))
        split = self._take(loaded, "split", str, "train")
        if kind == "load" or "MsDataset" in dotted(loaded.get("type")):
            subset = self._take(loaded, "subset_name", str, "")
            yield f"modelscope:{loaded.get('dataset_name') or loaded.get('path')}", split, subset
            return
        if kind == "load_from_disk":
            yield f"hf:{loaded.get('dataset_path') or loaded.get('path')}", split, ""
            return
        path = loaded.get("path")
        if path in ("json", "csv", "parquet", "text") or kind in ("load_jsonl_dataset", "load_json_file"):
            for file in _files(loaded.get("data_files") or loaded.get("data_dir")):
                if isinstance(file, str):
                    yield file.removeprefix("./"), "train", ""
                else:
                    self._list("data_files", file)
        elif isinstance(path, str) and path:
            for key in ("data_dir", "data_files"):
                if loaded.get(key):
                    self._notes.append(
                        f"XTuner reads only {key} {_short(loaded[key])} of {path}; here all of its {split}"
                    )
            yield (
                (path if path.startswith(("/", ".", "~")) else f"hf:{path}"),
                split,
                self._take(loaded, "name", str, ""),
            )
        else:
            self._list("dataset", path if path is not None else loaded.get("type"))

    def _layout(self, parts: Sequence[dict[str, Any]], task: str) -> dict[str, Any]:
        """Lengths, packing and template, which all datasets of a run share here."""
        first = parts[0]
        length = next(
            (part[key] for part in parts for key in ("max_length", "packed_length") if isinstance(part.get(key), int)),
            self._names.get("max_length"),
        )
        if not isinstance(length, int):
            self._list("max_length", length)
            length = 2048
        kind = last(first.get("type"))
        pack = kind == "build_packed_dataset" or (
            kind in ("process_hf_dataset", "process_ms_dataset") and first.get("pack_to_max_length", True) is True
        )
        templates = [self._template(part, task) for part in parts]
        if len(set(templates)) > 1:
            self._unread.append(f"{self._source}: its datasets have different templates: {', '.join(templates)}")
        return {"max_length": length, "pack": pack and task == "sft", "template": templates[0]}

    def _template(self, part: dict[str, Any], task: str) -> str:
        found = part.get("template_map_fn")
        if isinstance(found, dict):
            name = last(found.get("template"))
        elif found is not None:
            name = last(found)
        else:
            name = last(part.get("prompt_template") or part.get("template"))
            if not name:
                return (
                    self._evaluated_template()
                    if task != "sft" or last(part.get("type")) != "process_hf_dataset"
                    else NO_TEMPLATE
                )
        if name in get_args(TemplateName):
            return name
        self._list("template", found)
        return ""

    def _evaluated_template(self) -> str:
        name = last((self._hook() or {}).get("prompt_template"))
        return name if name in get_args(TemplateName) else ""

    # what is kept

    def _hook(self) -> dict[str, Any] | None:
        hooks = self._names.get("custom_hooks")
        for hook in hooks if isinstance(hooks, list | tuple) else []:
            if isinstance(hook, dict) and last(hook.get("type")) == "EvaluateChatHook":
                return hook
        return None

    def _record(self) -> dict[str, Any]:
        values: dict[str, Any] = {"sample_every": 0, "prompts": (), "system": ""}
        if hook := self._hook():
            values = {
                "sample_every": self._take(hook, "every_n_iters", int, 0), "prompts": self._prompts(hook),
                "system": self._system(hook),
                "max_new_tokens": self._take(hook, "max_new_tokens", int, 600),
            }  # fmt: skip
        hooks = self._names.get("default_hooks")
        if isinstance(hooks, dict) and isinstance(hooks.get("checkpoint"), dict):
            saved = hooks["checkpoint"]
            values["save_every"] = self._take(saved, "interval", int, -1)
            values["keep"] = self._take(saved, "max_keep_ckpts", int, -1)
            if saved.get("by_epoch", True) is True:
                self._list("checkpoint", "by_epoch=True")
                values["save_every"] = -1
        return values

    def _prompts(self, hook: dict[str, Any]) -> tuple[str, ...]:
        asked = hook.get("evaluation_inputs")
        asked = [asked] if isinstance(asked, str) else asked
        if isinstance(asked, list | tuple) and all(isinstance(each, str) and each.strip() for each in asked):
            return tuple(asked[:32])
        if asked is not None:
            self._list("evaluation_inputs", asked)
        return ()

    def _system(self, hook: dict[str, Any]) -> str:
        """The system text: SYSTEM_TEMPLATE's by name, and as XTuner formats it, with braces doubled."""
        value = hook.get("system") or ""
        if "SYSTEM_TEMPLATE." in dotted(value):
            try:
                value = system_text(last(value))
            except KeyError:
                self._list("system", value)
                return ""
        if not isinstance(value, str):
            self._list("system", value)
            return ""
        bot = self._names.get("bot_name")
        text = value.replace("{bot_name}", bot if isinstance(bot, str) else "{bot_name}")
        return text.replace("{{", "{").replace("}}", "}")

    def _check_rest(self) -> None:
        """Settings that change what is trained and are not read above."""
        for key in ("resume", "val_dataloader", "test_dataloader"):
            value = self._names.get(key)
            if value not in (None, False, {}):
                self._list(key, value)
        for name, value in self._names.items():
            if isinstance(value, Unread) and not any(str(value) in each for each in self._unread):
                self._notes.append(f"{value} (for {name}) was not run, and nothing that was taken over uses it")


def _files(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [each for part in value.values() for each in _files(part)]
    return value if isinstance(value, list | tuple) else [value]


def _name_of(place: str) -> str:
    """A dataset's name for a source: that of the built-in configs, else from the file or id."""
    if place in KNOWN_SOURCES:
        return KNOWN_SOURCES[place]
    stem = PurePosixPath(place.partition(":")[2] if place.startswith(("hf:", "modelscope:")) else place).name
    while PurePosixPath(stem).suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".xlsx"):
        stem = PurePosixPath(stem).stem
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()) if stem.isascii() else slugify(stem)
    return name.strip("-_")[:60] or "data"


def _named(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same with each name once."""
    seen: dict[str, int] = {}
    result = []
    for source in sources:
        count = seen[source.name] = seen.get(source.name, 0) + 1
        name = source.name if count == 1 else f"{source.name[:56]}_{count}"
        result.append(Source(name, source.source, source.format, source.split, source.subset, source.rows))
    return tuple(result)


def _short(value: Any) -> str:
    """A value in a few words: what is nested is not spelt out."""
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, str | int | float | bool):
        text = str(value)
        return text if len(text) <= 80 else f"{text[:77]}…"
    return {dict: "a dict", list: "a list", tuple: "a tuple"}.get(type(value), "a value that cannot be read")
