"""One of our configs as an XTuner config: a Python file that XTuner 0.1.23 takes, and that our import reads back.

What XTuner has no word for is kept in the file under the name `retune`, which XTuner does not look at.
"""

from pathlib import Path
from string import Template
from typing import Any

from studio.config.catalog.base_models import BY_ID
from studio.config.schema import EVERY_ROW, VIRTUAL_METHODS, RunConfig, parse_config
from studio.config.xtuner.importing import OWN_NAME, config_name, import_text
from studio.config.xtuner.terms import NO_TEMPLATE
from studio.errors import ConfigError, Problem

WHOLE = ("data.sources", "data.recipes")  # settings that are compared as one
DTYPES = {"float16": "float16", "bfloat16": "bfloat16"}
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
}
PACKAGE_TEMPLATE = Path(__file__).parent / "skeleton.py.txt"


def export_text(config: RunConfig, name: str = "") -> str:
    """The text of NAME.py. Raises ConfigError for a task that has no such form."""
    if config.task != "sft":
        raise ConfigError([Problem("task", f"{config.task} has no export to XTuner", "sft")], config.name)
    if config.method in VIRTUAL_METHODS:
        problem = Problem("method", f"{config.method} has no form in XTuner", "full, lora, qlora")
        raise ConfigError([problem], config.name)
    name = name or config.name
    plain = _rendered(config, {})
    read_back = import_text(plain, config_name(name)).config
    own = _differences(config, read_back)
    return _rendered(config, own) if own else plain


def _differences(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    """{path: value here} of what differs: what XTuner's words do not carry."""
    here, there = _flat(config.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return {path: value for path, value in here.items() if there.get(path, ...) != value}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, dict) and path not in WHOLE
        result |= _flat(value, f"{path}.") if nested else {path: value}
    return result


def _rendered(config: RunConfig, own: dict[str, Any]) -> str:
    skeleton = Template(PACKAGE_TEMPLATE.read_text(encoding="utf-8"))
    return skeleton.substitute(_words(config), own=_own(own))


def _own(own: dict[str, Any]) -> str:
    if not own:
        return ""
    lines = "".join(f"    {path!r}: {value!r},\n" for path, value in own.items())
    note = "# What XTuner has no word for. It does not look at this; `retune config import` does.\n"
    return f"\n{note}{OWN_NAME} = {{\n{lines}}}\n"


def _words(config: RunConfig) -> dict[str, Any]:
    """What is put into the skeleton; texts and numbers as Python writes them."""
    train, record, data = config.train, config.record, config.data
    accumulation = train.gradient_accumulation_steps
    package, optimizer = OPTIMIZERS[train.optimizer]
    loop = f"max_iters={train.num_steps * accumulation}" if train.num_steps else f"max_epochs={train.num_epochs!r}"
    return {
        "name": config.name, "base": repr(config.model.base.removeprefix("modelscope:")),
        "optimizer_package": package, "optimizer": optimizer, "loop": loop,
        "template": _template(config),
        "max_length": data.max_length, "pack": data.pack != "none", "batch": train.micro_batch_size,
        "accumulation": accumulation, "learning_rate": repr(train.learning_rate),
        "betas": repr((train.beta1, train.beta2)), "weight_decay": repr(train.weight_decay),
        "clip": f"dict(max_norm={train.max_grad_norm!r}, error_if_nonfinite=False)" if train.max_grad_norm else "None",
        "save_steps": record.save_every_steps * accumulation or -1,
        "keep": record.keep_last, "evaluation_freq": repr(record.sample_every_steps * accumulation or None),
        "system": repr(record.sample_system.replace("{", "{{").replace("}", "}}")),
        "inputs": repr(list(record.sample_prompts)), "load_from": repr(config.model.continue_from or None),
        "new_tokens": record.sample_max_new_tokens,
        "seed": train.seed, "checkpointing": train.gradient_checkpointing,
        "model_parts": _quantisation(config) + _lora(config), "imports": _imports(config),
        "datasets": _datasets(config), "dataset": _dataset_name(config), "wrapper": _wrapper(config),
        "scheduler": _scheduler(config),
    }  # fmt: skip


def _template(config: RunConfig) -> str:
    """XTuner's word for the template. It has none for "as the tokenizer says": where the base is a known model, its
    own is taken."""
    name = config.data.template
    if not name and config.model.base in BY_ID:
        name = BY_ID[config.model.base].template
    return "None" if name in ("", NO_TEMPLATE) else f"PROMPT_TEMPLATE.{name}"


def _quantisation(config: RunConfig) -> str:
    if config.method != "qlora":
        return "torch_dtype=torch.float32)" if config.method == "full" else "torch_dtype=torch.float16)"
    return """torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type='nf4'))"""


def _lora(config: RunConfig) -> str:
    if config.method == "full":
        return ""
    lora = config.lora
    names = None if lora.target_modules == "all-linear" else lora.target_modules.split(",")
    targets = f"\n        target_modules={names!r}," if names else ""
    kinds = {"use_dora": lora.dora, "use_rslora": lora.rslora}
    targets += "".join(f"\n        {kind}=True," for kind, is_on in kinds.items() if is_on)
    return f""",
    lora=dict(
        type=LoraConfig,
        r={lora.rank},
        lora_alpha={lora.alpha},
        lora_dropout={lora.dropout!r},{targets}
        bias='none',
        task_type='CAUSAL_LM')"""


def _imports(config: RunConfig) -> str:
    """The lines that not every config needs."""
    maps = sorted(
        {_map_name(each.format) for each in config.data.recipes.values() if _map_name(each.format)} | {"openai"}
    )
    lines = [f"from xtuner.dataset.map_fns import ({', '.join(f'{name}_map_fn' for name in maps)},\n"
             "                                     template_map_fn_factory)"]  # fmt: skip
    if config.method != "full":
        lines.insert(0, "from peft import LoraConfig")
    if config.method == "qlora":
        lines.insert(0, "from transformers import BitsAndBytesConfig")
    return "\n".join(lines)


XTUNER_MAPS = {
    "alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitant", "default", "law_reference", "medical",
    "msagent_react", "oasst1", "openai", "openorca", "pretrain", "sql", "stack_exchange", "tiny_codes", "wizardlm",
}  # fmt: skip


def _map_name(format: str) -> str:
    """XTuner's map for a format; "" where it has none."""
    name = {"crime_kg_assitan": "crime_kg_assitant", "messages": "openai"}.get(format, format)
    return name if name in XTUNER_MAPS else ""


def _datasets(config: RunConfig) -> str:
    return "\n\n".join(_dataset(config, name) for name in config.data.sources)


def _variable(name: str) -> str:
    return "data_" + name.replace("-", "_")


def _dataset(config: RunConfig, name: str) -> str:
    data = config.data
    recipe, portion = data.recipes.get(name), data.sources[name]
    map_name, loaded = "openai", f"path='json', data_files=dict(train={f'data/{name}.jsonl'!r})"
    if recipe:
        map_name, loaded = _map_name(recipe.format), _loaded(recipe)
    rows = getattr(portion, "rows", None)
    limit = f"\n    max_dataset_length={rows}," if rows and portion != EVERY_ROW else ""
    template = "dict(\n        type=template_map_fn_factory, template=prompt_template)"
    if _template(config) == "None":
        template = "None"
    return f"""{_variable(name)} = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, {loaded}),
    tokenizer=tokenizer,
    max_length=max_length,{limit}
    dataset_map_fn={f"{map_name}_map_fn" if map_name else None},
    template_map_fn={template},
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack_to_max_length,
    use_varlen_attn=use_varlen_attn)"""


def _loaded(recipe: Any) -> str:
    source = recipe.source.removeprefix("hf:").removeprefix("modelscope:")
    if source == recipe.source:
        return f"path='json', data_files=dict(train={source!r})"
    parts = [f"path={source!r}"]
    parts += [f"name={recipe.subset!r}"] if recipe.subset else []
    parts += [f"split={recipe.split!r}"] if recipe.split != "train" else []
    return ", ".join(parts)


def _dataset_name(config: RunConfig) -> str:
    names = [_variable(name) for name in config.data.sources]
    return names[0] if len(names) == 1 else f"dict(type=ConcatDataset, datasets=[{', '.join(names)}])"


def _wrapper(config: RunConfig) -> str:
    if config.model.dtype == "float32":
        return "type=OptimWrapper,"
    dtype = DTYPES.get(config.model.dtype, "float16")
    return f"type=AmpOptimWrapper,\n    loss_scale='dynamic',\n    dtype={dtype!r},"


def _scheduler(config: RunConfig) -> str:
    """Warm-up, then the schedule. XTuner counts in micro-batches: a step has as many as accumulate."""
    train = config.train
    total, unit = (train.num_steps, False) if train.num_steps else (train.num_epochs, True)
    assert total
    if not unit:
        total *= train.gradient_accumulation_steps
    if train.warmup_ratio is not None:
        warmup: Any = train.warmup_ratio * total if unit else int(train.warmup_ratio * total)
        warm_unit = unit
    else:
        warmup, warm_unit = train.warmup_steps * train.gradient_accumulation_steps, False
    begin = warmup if warm_unit == unit else 0
    parts = []
    if warmup:
        parts.append(_part("LinearLR", "start_factor=1e-5", 0, warmup, warm_unit))
    lowest = train.final_learning_rate_ratio
    kind, setting = {
        "cosine": ("CosineAnnealingLR", f"eta_min={lowest * train.learning_rate!r}"),
        "linear": ("LinearLR", f"start_factor=1.0, end_factor={lowest!r}"),
        "constant": ("ConstantLR", "factor=1.0"),
    }[train.schedule]
    return ",\n".join([*parts, _part(kind, setting, begin, total, unit)])


def _part(kind: str, setting: str, begin: Any, end: Any, by_epoch: bool) -> str:
    convert = ",\n        convert_to_iter_based=True" if by_epoch else ""
    return f"""    dict(
        type={kind},
        {setting},
        by_epoch={by_epoch},
        begin={begin!r},
        end={end!r}{convert})"""


def export_file(config: RunConfig, path: Path) -> str:
    """The text for a file of that name, checked: what is read back is the config. Raises ConfigError."""
    text = export_text(config, path.stem)
    read_back = import_text(text, config_name(path.stem)).config
    if read_back != parse_config(config.model_dump(mode="json")):
        raise ConfigError([Problem("(export)", "does not read back as it was; this is a fault of Retune")], config.name)
    return text
