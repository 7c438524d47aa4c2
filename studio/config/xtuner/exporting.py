"""One of our configs as an XTuner config: a Python file that XTuner 0.1.23 takes, and that our import reads back.

What XTuner has no word for is kept in the file under the name `retune`, which XTuner does not look at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from studio.config.catalog.base_models import BY_ID, KnownModel
from studio.config.catalog.families import known_model_type, named_like
from studio.config.schema import VIRTUAL_METHODS, RunConfig, parse_config
from studio.config.xtuner.exported_data import DataPart, data_part
from studio.config.xtuner.importing import OWN_NAME, config_name, import_text
from studio.config.xtuner.terms import NO_TEMPLATE
from studio.errors import ConfigError, Problem
from studio.models import MODELSCOPE_PREFIX, STARTER, resolve

WHOLE = ("data.sources", "data.recipes")  # settings that are compared as one
DTYPES = {"float16": "float16", "bfloat16": "bfloat16"}
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
}
# model_type of config.json of models that XTuner's transformers loads by the code that they bring, as XTuner's own
# configs have it; and what their tokenizers must be told there.
BRING_CODE = {
    "baichuan", "chatglm", "deepseek", "deepseek_v2", "internlm", "internlm2", "internlm3", "minicpm", "qwen",
}  # fmt: skip
ENDS = {"minicpm": "</s>", "qwen": "<|endoftext|>"}
QWEN_CHAT_END = "<|im_end|>"
PACKAGE_TEMPLATE = Path(__file__).parent / "skeleton.py.txt"


@dataclass(frozen=True)
class Exported:
    """`text` is the file's. `written`: sources whose rows XTuner cannot read where they are, {name: file beside it};
    `notes` say what is otherwise there."""

    text: str
    written: dict[str, str]
    notes: tuple[str, ...]


def export_text(config: RunConfig, name: str = "") -> str:
    """The text of NAME.py. Raises ConfigError for a task that has no such form."""
    if config.task != "sft":
        raise ConfigError([Problem("task", f"{config.task} has no export to XTuner", "sft")], config.name)
    if config.method in VIRTUAL_METHODS:
        problem = Problem("method", f"{config.method} has no form in XTuner", "full, lora, qlora")
        raise ConfigError([problem], config.name)
    name = name or config.name
    plain = _rendered(config, name, {})
    read_back = import_text(plain, config_name(name)).config
    own = _differences(config, read_back)
    return _rendered(config, name, own) if own else plain


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


def _rendered(config: RunConfig, stem: str, own: dict[str, Any]) -> str:
    skeleton = Template(PACKAGE_TEMPLATE.read_text(encoding="utf-8"))
    data = data_part(config, stem, _template(config))
    return skeleton.substitute(
        _words(config), imports=_imports(config, data), datasets=data.text, dataset=data.dataset, own=_own(own)
    )


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
        "name": config.name, "base": repr(_base(config)), "model_code": _model_code(config),
        "tokenizer_settings": _tokenizer_settings(config),
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
        "seed": train.seed, "checkpointing": train.gradient_checkpointing is not False,
        "model_parts": _quantisation(config) + _lora(config), "wrapper": _wrapper(config),
        "scheduler": _scheduler(config),
    }  # fmt: skip


def _base(config: RunConfig) -> str:
    """The base as XTuner finds it: an id of the hub, or a folder."""
    base = config.model.base
    return str(resolve(base).folder) if base == STARTER else base.removeprefix(MODELSCOPE_PREFIX)


def _known(config: RunConfig) -> KnownModel | None:
    return BY_ID.get(config.model.base.removeprefix(MODELSCOPE_PREFIX))


def _model_code(config: RunConfig) -> str:
    brings = known_model_type(config.model.base) in BRING_CODE
    # Text for XTuner, as its own configs have it; nothing here loads by it.
    return "\n        trust_remote_code=True,  # it brings code, which XTuner runs" if brings else ""


def _tokenizer_settings(config: RunConfig) -> str:
    """What XTuner's configs tell the tokenizer of a family."""
    family, template = known_model_type(config.model.base), _template(config).rpartition(".")[2]
    known = _known(config)
    lines = ["trust_remote_code=True"] if family in BRING_CODE else []  # text for XTuner, as above
    lines += ["encode_special_tokens=True"] if "chatglm3" in (template, known and known.family) else []
    if end := QWEN_CHAT_END if family == "qwen" and template == "qwen_chat" else ENDS.get(family):
        lines.append(f"eos_token={end!r}")
    lines.append(f"padding_side={'left' if family == 'chatglm' else 'right'!r}")
    return ",\n    ".join(lines)


def _template(config: RunConfig) -> str:
    """XTuner's word for the template. It has none for "as the tokenizer says": the one that XTuner has for a known
    base is taken, else one that writes as the tokenizer does."""
    known = _known(config)
    name = config.data.template or (known.template if known else "") or named_like(config.model.base)
    return "None" if name in ("", NO_TEMPLATE) else f"PROMPT_TEMPLATE.{name}"


def _quantisation(config: RunConfig) -> str:
    dtype = config.model.dtype if config.model.dtype != "auto" else "float16"
    if config.method != "qlora":
        return f"torch_dtype=torch.{'float32' if config.method == 'full' else dtype})"
    return f"""torch_dtype=torch.{dtype},
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.{dtype},
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


def _imports(config: RunConfig, data: DataPart) -> str:
    """The lines that not every config needs."""
    lines = ["from peft import LoraConfig"] if config.method != "full" else []
    if config.method == "qlora":
        lines.insert(0, "from transformers import BitsAndBytesConfig")
    return "\n".join([*lines, *data.imports])


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


def export_file(config: RunConfig, path: Path) -> Exported:
    """What a file of that name holds, checked: what is read back is the config. Raises ConfigError."""
    text = export_text(config, path.stem)
    read_back = import_text(text, config_name(path.stem)).config
    if read_back != parse_config(config.model_dump(mode="json")):
        raise ConfigError([Problem("(export)", "does not read back as it was; this is a fault of Retune")], config.name)
    return Exported(text, data_part(config, path.stem, _template(config)).written, tuple(_notes(config)))


def _notes(config: RunConfig) -> Iterator[str]:
    if _template(config) == "None" and config.data.template != NO_TEMPLATE:
        yield "XTuner has no template that writes as this model's tokenizer: its rows become bare text there"
    if known_model_type(config.model.base) in BRING_CODE:
        yield f"XTuner runs the code that {config.model.base} brings (trust_remote_code)"
    if len(config.data.sources) > 1 and any(isinstance(share, float) for share in config.data.sources.values()):
        yield "XTuner takes every row of each source once an epoch: the shares of the mixture are not kept there"
    if config.distributed.strategy == "deepspeed":
        yield "DeepSpeed is no part of XTuner's configs: give --deepspeed there"
