"""Everything one run needs, as one typed value. Form, YAML, command line, estimate and trainer all read this file.

Each field says its default, its limits and, in `description`, what it does: a setting is written once.
`advanced=True` folds a field away in the form, `form=False` keeps it out of it.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from studio.errors import ConfigError, Problem

Method = Literal["lora", "qlora", "full", "prompt_tuning", "prefix_tuning"]
VIRTUAL_METHODS = ("prompt_tuning", "prefix_tuning")
ADAPTER_METHODS = ("lora", "qlora", *VIRTUAL_METHODS)
Task = Literal["sft", "dpo", "orpo", "reward", "vision"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TemplateName = Literal[
    "", "default", "zephyr", "internlm_chat", "internlm2_chat", "moss_sft", "llama2_chat", "code_llama_chat",
    "chatglm2", "chatglm3", "qwen_chat", "baichuan_chat", "baichuan2_chat", "wizardlm", "wizardcoder", "vicuna",
    "deepseek_coder", "deepseekcoder", "deepseek_moe", "deepseek_v2", "mistral", "mixtral", "minicpm", "gemma",
    "cohere_chat", "llama3_chat", "phi3_chat", "none",
]  # fmt: skip
SLUG_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
ANY_BOOL = TypeAdapter(bool)
ADVANCED = {"advanced": True}
ZERO_PRESETS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
NOT_IN_FORM = {"form": False}


class Section(BaseModel):
    """A group of settings. Unknown keys are refused: a misspelt setting must not be ignored in silence."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """What training starts from."""

    base: str = Field(
        "starter",
        min_length=1,
        description="Base model: `starter`, a local folder, a Hugging Face id, or modelscope:ID.",
    )
    dtype: Dtype = Field(
        "auto", description="Number format of weights and arithmetic; auto takes what the device does best."
    )
    attention: Literal["auto", "blocks", "sdpa", "eager", "varlen", "flex", "flash_attention_2"] = Field(
        "auto",
        description=(
            "Attention kernel; auto takes the fastest one that works here, on a GPU after measuring once. varlen, flex "
            "and flash_attention_2 need a GPU."
        ),
        json_schema_extra=ADVANCED,
    )
    continue_from: str = Field(
        "",
        max_length=4096,
        description="Weights to begin with: an adapter folder or a .pth of an earlier run. Empty: the base as it is.",
        json_schema_extra=ADVANCED,
    )


class LoraSection(Section):
    """Shape of the adapter, for lora and qlora."""

    rank: int = Field(16, ge=1, le=1024, description="Width of the adapter: more learns more and weighs more.")
    alpha: int = Field(32, ge=1, le=4096, description="Strength of the adapter; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of adapter inputs dropped while training.")
    target_modules: str = Field(
        "all-linear",
        pattern=r"^(all-linear|[A-Za-z0-9_.]+(,[A-Za-z0-9_.]+)*)$",
        description="Layers that get an adapter: all-linear, or names with commas (q_proj,v_proj).",
        json_schema_extra=ADVANCED,
    )
    dora: bool = Field(
        False,
        description="DoRA: length and direction of each weight learn apart; often better at low ranks, slower.",
        json_schema_extra=ADVANCED,
    )
    rslora: bool = Field(
        False,
        description="rsLoRA: scale by alpha / √rank, which keeps high ranks from learning too little.",
        json_schema_extra=ADVANCED,
    )
    plus_ratio: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="LoRA+: the second matrix of the adapter learns this many times faster; 16 is usual, 1 is off.",
        json_schema_extra=ADVANCED,
    )


class PromptSection(Section):
    """Tokens that only the model sees, for prompt_tuning and prefix_tuning."""

    num_virtual_tokens: int = Field(
        20, ge=1, le=4096, description="Learned tokens before every text: more learn more and cost as many tokens."
    )


class RowCount(Section):
    """A source that gives a number of rows to every epoch, on top of those of the sources with shares."""

    rows: int = Field(ge=1, le=20_000_000, description="Rows in every epoch.")


EVERY_ROW = "all"


def _portion_kind(value: Any) -> str:
    if value == EVERY_ROW:
        return "all"
    return "rows" if isinstance(value, dict | RowCount) else "share"


Portion = Annotated[
    Annotated[float, Field(gt=0), Tag("share")]
    | Annotated[RowCount, Tag("rows")]
    | Annotated[Literal["all"], Tag("all")],
    Discriminator(_portion_kind),
]


class Recipe(Section):
    """Where a dataset can be had, for a project that does not have it yet."""

    source: str = Field(
        min_length=1, max_length=1000, description="hf:ID, modelscope:ID, or a file or folder of this machine."
    )
    format: str = Field(
        "",
        pattern=r"^[a-z0-9_]*$",
        description="Layout of its rows (retune data formats); empty recognises each row.",
    )
    split: str = Field("train", description="Split of a hub's data set.")
    subset: str = Field("", description="Subset of a hub's data set, where it has several.")


class DataSection(Section):
    """What is learned, and how rows become sequences."""

    sources: dict[Slug, Portion] = Field(
        default_factory=lambda: {"identity": 0.5, "general": 0.5},
        min_length=1,
        description=(
            "Datasets of the project. A number is a share of the rows, relative to the other shares (0.5); "
            "a count such as 2000 rows, in YAML {rows: 2000}, is what the dataset adds to every epoch; "
            "all adds each of its rows once."
        ),
    )
    recipes: dict[Slug, Recipe] = Field(
        default_factory=dict,
        description="Where datasets come from that the project does not have yet; `retune data fetch` gets them.",
        json_schema_extra=NOT_IN_FORM,
    )
    max_length: int = Field(512, ge=16, le=1_048_576, description="Longest sequence in tokens; what is longer is cut.")
    pack: Literal["none", "sequence", "tree"] = Field(
        "tree",
        description=(
            "none: one example a line. sequence: several examples fill one line of a batch without seeing each other. "
            "tree: examples that begin alike also share the computation of that beginning. The gradient is the same; "
            "with dropout, shared beginnings share what is dropped."
        ),
    )
    template: TemplateName = Field(
        "",
        description="How a chat is written for the model. Empty: as its tokenizer says; none: no words around it.",
        json_schema_extra=ADVANCED,
    )
    loss_on: Literal["assistant", "all", "last"] = Field(
        "assistant",
        description="Which messages are learned: the assistant's, all, or the last answer only.",
        json_schema_extra=ADVANCED,
    )
    valid_share: float = Field(
        0.05, ge=0, le=0.5, description="Share of rows kept out of training to measure valid/loss."
    )


class TrainSection(Section):
    """The optimizer and how long it works."""

    num_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps; leave empty to count in epochs."
    )
    num_epochs: float | None = Field(3.0, gt=0, le=1000, description="Passes over the data; used when steps are empty.")
    micro_batch_size: int = Field(8, ge=1, le=4096, description="Examples per forward pass on a device.")
    gradient_accumulation_steps: int = Field(2, ge=1, le=4096, description="Forward passes per optimizer step.")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: int = Field(5, ge=0, description="Steps over which the learning rate rises from zero.")
    warmup_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The same as a share of all steps (0.03); when given, it counts instead of the number.",
        json_schema_extra=ADVANCED,
    )
    final_learning_rate_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Where cosine and linear end, as a share of the peak learning rate.",
        json_schema_extra=ADVANCED,
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8-bit and paged variants come from bitsandbytes and save memory on a GPU.",
        json_schema_extra=ADVANCED,
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Pull of weights towards zero.", json_schema_extra=ADVANCED
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: memory of the gradient.", json_schema_extra=ADVANCED)
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW: memory of its square.", json_schema_extra=ADVANCED)
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradients longer than this are scaled down; 0 switches it off.",
        json_schema_extra=ADVANCED,
    )
    gradient_checkpointing: Literal["auto", True, False] = Field(
        False,
        description=(
            "Compute activations twice instead of keeping them: less memory, slower. auto: only where the memory that "
            "is free when the run starts would not do otherwise; the run says so, and keeps to it."
        ),
    )
    offload_activations: bool = Field(
        False,
        description="Keep activations in main memory until they are needed: less GPU memory, slower.",
        json_schema_extra=ADVANCED,
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "Compile what layers compute between their products. auto: on a CPU where a C++ compiler is found, which "
            "takes some 20 seconds once; steps are about a quarter faster. on: on a GPU, too, by torch.compile, half a "
            "minute at the first start; layers that run their own code, as in full training, whole. Goes on without "
            "where it cannot, and says why."
        ),
        json_schema_extra=ADVANCED,
    )
    liger: Literal["auto", "off"] = Field(
        "auto",
        description=(
            "Kernels of liger-kernel, where it is installed: auto takes those that give the same result and measure "
            "faster on this GPU, for what is not one pass already."
        ),
        json_schema_extra=ADVANCED,
    )
    cuda_graph: Literal["off", "auto", "on"] = Field(
        "off",
        description=(
            "Record a pass as a CUDA graph and replay it: small models wait less for their kernels to start, and more "
            "memory is held. auto does so where the gradient is the same and it is faster, tried at the first steps; "
            "on refuses where it cannot. Not measured on a GPU yet."
        ),
        json_schema_extra=ADVANCED,
    )
    on_out_of_memory: Literal["stop", "smaller_micro_batch"] = Field(
        "stop",
        description=(
            "When memory runs out: stop says what would fit; smaller_micro_batch takes the step again in halves and "
            "goes on so. The result is the same."
        ),
    )
    max_bad_steps: int = Field(
        3,
        ge=1,
        le=1000,
        description="Steps in a row that may go wrong (no finite loss, or one that runs away) before the run stops.",
        json_schema_extra=ADVANCED,
    )
    divergence_factor: float = Field(
        5.0,
        ge=0,
        description="A loss this many times above its best, and above where it began, runs away; 0 never does.",
        json_schema_extra=ADVANCED,
    )
    early_stop_patience: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Stop when so many measurements of record.best_by in a row bring no new best; 0 never stops early.",
    )
    stop_at_identity: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "Stop once this share of the held-out questions about itself is answered, two measurements in a row; "
            "0 never does."
        ),
    )
    stop_at_forgetting: float = Field(
        0.0,
        ge=0,
        description=(
            "Stop once its perplexity on what the base answered has grown by more than this share, two measurements "
            "in a row (0.2: by 20 %); 0 never does."
        ),
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Every random choice of the run comes from this number.")

    @field_validator("compile", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """Before it was a choice of three it was true or false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _any_word_for_true(cls, value: Any) -> Any:
        """Before there was auto it was true or false, in all of pydantic's spellings."""
        try:
            return ANY_BOOL.validate_python(value)
        except ValidationError:
            return value


class RecordSection(Section):
    """What is kept of a run while it goes on."""

    save_every_steps: int = Field(
        0, ge=0, description="Checkpoint interval in steps; 0 saves by time and at the end only."
    )
    save_every_minutes: float = Field(
        2.0,
        ge=0,
        description=(
            "A step that ends saves a checkpoint when the last one is so many minutes old: a kill or a power cut costs "
            "little more. Less often where saving would take more than a twentieth of the time; 0 never."
        ),
    )
    keep_last: int = Field(2, ge=1, le=1000, description="Newest checkpoints that are kept.")
    evaluate_every_steps: int = Field(10, ge=0, description="Interval for valid/loss in steps; 0 never.")
    best_by: Literal["none", "valid_loss", "probe_score", "probe_balance"] = Field(
        "none",
        description=(
            "Save a checkpoint whenever this is better than ever before, and keep the best one: valid_loss, "
            "probe_score (identity minus leakage on held-out questions), or probe_balance (that, minus the growth of "
            "perplexity on what the base answered)."
        ),
    )
    probe_every_steps: int = Field(
        0,
        ge=0,
        description=(
            "Interval for asking held-out questions, which gives probe/identity, probe/leakage and probe/retention; "
            "0 never."
        ),
    )
    num_probes: int = Field(
        8,
        ge=1,
        le=1000,
        description="Questions of each kind (identity, general) that are asked then.",
        json_schema_extra=ADVANCED,
    )
    sample_every_steps: int = Field(
        20, ge=0, description="Interval for samples in steps; 0 only before and after training."
    )
    sample_prompts: tuple[str, ...] = Field(
        ("Who are you?", "What is the capital of France?"),
        max_length=32,
        description="Questions asked at every sample.",
    )
    sample_system: str = Field(
        "",
        max_length=20_000,
        description="System prompt of the samples; empty asks without one.",
        json_schema_extra=ADVANCED,
    )
    sample_max_new_tokens: int = Field(
        48, ge=1, le=4096, description="Longest sample in tokens.", json_schema_extra=ADVANCED
    )


class DistributedSection(Section):
    """How many processes train together, and what starts them. The global batch grows with them."""

    strategy: Literal["none", "ddp", "deepspeed"] = Field(
        "none",
        description=(
            "none: one process. ddp: every process has the whole model and part of each step's rows. "
            "deepspeed: they also share out optimizer, gradients or weights (ZeRO)."
        ),
    )
    deepspeed: str = Field(
        "zero2",
        min_length=1,
        max_length=1000,
        description=(
            "ZeRO preset for deepspeed: zero1, zero2, zero2_offload, zero3, zero3_offload, or a path to a DeepSpeed "
            "JSON of your own."
        ),
    )
    launcher: Literal["none", "torchrun", "deepspeed", "slurm"] = Field(
        "none", description="What starts the processes; none: the run's own job does.", json_schema_extra=ADVANCED
    )
    processes_per_node: int = Field(1, ge=1, le=128, description="Processes on each machine: one a GPU.")
    nodes: int = Field(1, ge=1, le=4096, description="Machines that train together.", json_schema_extra=ADVANCED)

    @field_validator("deepspeed")
    @classmethod
    def _preset_or_json(cls, value: str) -> str:
        """XTuner's spellings (`deepspeed_zero2`) are taken; anything else must look like a JSON file."""
        name = value.removeprefix("deepspeed_")
        if name in ZERO_PRESETS:
            return name
        if not value.endswith(".json"):
            raise ValueError(f"is no preset ({', '.join(ZERO_PRESETS)}) and no path to a .json file")
        return value

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes_per_node


class RunConfig(Section):
    """The complete, frozen configuration of one run."""

    name: Slug = Field("starter_lora", description="Name of the config; runs are numbered after it.")
    method: Method = Field(
        "lora",
        description=(
            "lora: small adapter. qlora: adapter on a 4-bit base. full: every weight. prompt_tuning: a few learned "
            "tokens before every text. prefix_tuning: their keys and values in every layer."
        ),
    )
    task: Task = Field(
        "sft",
        description="sft learns from conversations and texts and can be trained; the others are only shown so far.",
        json_schema_extra=NOT_IN_FORM,
    )
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    prompt: PromptSection = Field(default_factory=PromptSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    record: RecordSection = Field(default_factory=RecordSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)

    @model_validator(mode="after")
    def _cross_checks(self) -> "RunConfig":
        if self.train.num_steps is None and self.train.num_epochs is None:
            raise ValueError("train: give num_steps or num_epochs, or both (then steps win)")
        counts_steps = self.train.num_steps is not None and self.train.warmup_ratio is None
        if counts_steps and self.train.warmup_steps >= self.train.num_steps:
            raise ValueError(
                f"train.warmup_steps: {self.train.warmup_steps} leaves no step at full learning rate; "
                f"it must be below num_steps = {self.train.num_steps}, for example 0"
            )
        self._check_distributed()
        self._check_virtual_tokens()
        self._require_measured_best()
        return self

    def _check_virtual_tokens(self) -> None:
        if self.method == "prefix_tuning" and self.train.gradient_checkpointing is True:
            raise ValueError(
                "train.gradient_checkpointing: does not work with prefix_tuning, whose keys and values it would drop; "
                "switch it off, or take prompt_tuning"
            )

    def _check_distributed(self) -> None:
        spread = self.distributed
        if spread.strategy == "none" and spread.world_size > 1:
            raise ValueError(
                f"distributed.strategy: none trains in one process, and {spread.world_size} are asked for; "
                "choose ddp or deepspeed"
            )
        if spread.launcher == "deepspeed" and spread.strategy != "deepspeed":
            raise ValueError("distributed.launcher: deepspeed starts processes of the strategy deepspeed only")
        if spread.strategy == "deepspeed" and self.train.optimizer != "adamw":
            raise ValueError(f"train.optimizer: {self.train.optimizer} does not work with DeepSpeed; take adamw")

    def _require_measured_best(self) -> None:
        """What is to be best must be measured, and stopping early needs a best."""
        record = self.record
        if self.train.early_stop_patience and record.best_by == "none":
            raise ValueError("train.early_stop_patience: needs record.best_by (valid_loss, probe_score…)")
        if record.best_by == "valid_loss" and not (record.evaluate_every_steps and self.data.valid_share):
            raise ValueError(
                "record.best_by: valid_loss needs record.evaluate_every_steps and data.valid_share above 0"
            )
        if record.best_by.startswith("probe_") and not record.probe_every_steps:
            raise ValueError(f"record.best_by: {record.best_by} needs record.probe_every_steps above 0")
        for name in ("stop_at_identity", "stop_at_forgetting"):
            if getattr(self.train, name) and not record.probe_every_steps:
                raise ValueError(f"train.{name}: needs record.probe_every_steps above 0")

    @property
    def graph_obstacle(self) -> str:
        """Which setting does at every pass what a CUDA graph cannot repeat; "" for none."""
        train = self.train
        if self.distributed.strategy == "deepspeed":
            return "DeepSpeed runs the backward pass itself"
        if train.gradient_checkpointing is True or train.offload_activations:
            return "gradient_checkpointing and offload_activations look at the GPU from outside during a pass"
        return "lora.dropout draws anew at every pass" if self.lora.dropout and self.method != "full" else ""

    @property
    def records_passes(self) -> bool:
        """Whether a GPU may replay passes as CUDA graphs, as far as the settings say."""
        return self.train.cuda_graph != "off" and not self.graph_obstacle

    @property
    def examples_per_step(self) -> int:
        """Rows that one optimizer step sees on all devices: the global batch."""
        return self._rows_per_process * self.distributed.world_size

    @property
    def _rows_per_process(self) -> int:
        return self.train.micro_batch_size * self.train.gradient_accumulation_steps

    def micro_batches(self, most: int) -> tuple[int, int]:
        """Another split of the same step: rows of a micro-batch, `most` at most, and how many each process has."""
        rows = self._rows_per_process
        size = next(each for each in range(most, 0, -1) if rows % each == 0)
        return size, rows // size


def parse_config(values: Any, source: str = "config") -> RunConfig:
    """A RunConfig from plain values. Raises ConfigError with every problem: path, value, and what is allowed."""
    if not isinstance(values, dict):
        raise ConfigError([Problem("(top)", f"expected settings by name, got {type(values).__name__}")], source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_problem(item) for item in error.errors()], source) from None


def _problem(item: Any) -> Problem:
    location = _without_kinds(item["loc"])
    path = ".".join(str(part) for part in location) or "(top)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return Problem(path, "is not a setting", ", ".join(_siblings(location)))
    if item.get("ctx", {}).get("pattern") == SLUG_PATTERN:
        return Problem(path, f"cannot be {item['input']!r}", "up to 64 lower-case letters, digits, - and _")
    if not isinstance(item["input"], dict):
        message += f", got {item['input']!r}"
    return Problem(path, message, _allowed(location))


def _without_kinds(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place of a problem as the config has it: behind a source's name pydantic adds the kind of its value."""
    if location[:2] == ("data", "sources") and location[3:4] in (("share",), ("rows",), ("all",)):
        return location[:3] + location[4:]
    return location


def field_at(path: tuple[Any, ...]) -> Any:
    """The pydantic field of a path such as ("train", "learning_rate"); None where there is none."""
    section: Any = RunConfig
    field = None
    for part in path:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return None
        field = fields[part]
        section = field.annotation
    return field


def _siblings(path: tuple[Any, ...]) -> list[str]:
    for name, kind in (("sources", RowCount), ("recipes", Recipe)):
        if path[:2] == ("data", name):
            return list(kind.model_fields)
    parent = field_at(path[:-1]).annotation if path[:-1] else RunConfig
    return list(getattr(parent, "model_fields", {}))


def _allowed(path: tuple[Any, ...]) -> str:
    field = field_at(path)
    if field is None:
        return ""
    options = [option for option in get_args(field.annotation) if isinstance(option, str | bool)]
    choices = [str(option).lower() if isinstance(option, bool) else option for option in options]
    limits = [
        f"{symbol} {getattr(rule, name)}"
        for rule in field.metadata
        for name, symbol in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(rule, name, None) is not None
    ]
    return ", ".join(choices or limits)
