"""Memory, disk and what would fit, from a config and a model's sizes. Plain arithmetic: no torch, no model, no data."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from studio.config import zero
from studio.config.schema import VIRTUAL_METHODS, RecordSection, RunConfig, parse_config
from studio.errors import ConfigError, Problem
from studio.machine import Device
from studio.model_shapes import Shapes

GIB, MIB = 2**30, 2**20
FLOAT32, ADAMW_BYTES, ADAMW_8BIT_BYTES = 4, 8, 2
# NF4: half a byte a weight; each 64 weights share an 8-bit scale, each 256 scales a float32 one.
NF4_BYTES, NF4_CONSTANT_BYTES = 1 / 2, 1 / 64 + 4 / (64 * 256)
ROW_TOKENS = 1024  # tokens of a row on a CPU, as in the trainer
HEAD_ROWS = 256  # positions that go through the output head at once, as in the trainer


Basis = Literal["counted", "drawn", "longest"]


@dataclass(frozen=True)
class Load:
    """The most that is computed at once: `rows` of `width` tokens; `num_trained` of them ask the head.

    `longest`: tokens of the longest example. `tokens_per_step`: of the examples of one step, on average. `basis`: the
    datasets' stored tokens, some rows that were drawn from them, or nothing: then every example is taken to be as long
    as may be. `varies`: not all micro-batches are about that large.
    """

    rows: int
    width: int
    longest: int
    num_trained: int
    tokens_per_step: float
    basis: Basis = "longest"
    varies: bool = True

    @property
    def num_tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step in one process, by what holds them.

    `optimizer`: with DeepSpeed the float32 masters too. `overhead`: libraries, the device's context, the allocator.
    """

    weights: int
    quantisation: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes: one checkpoint; all there are at once; the converted weights; a merged model (0: nothing to merge)."""

    checkpoint: int
    checkpoints: int
    converted: int
    merged: int


@dataclass(frozen=True)
class Suggestion:
    """Settings to change, all together, and the memory of the config after that."""

    settings: dict[str, Any]
    memory: Memory
    fits: bool


LoadOf = Callable[[RunConfig], Load]


def number_bytes(config: RunConfig, device: Device) -> int:
    """Bytes of a number that the model computes with."""
    dtype = config.model.dtype
    if dtype == "auto":
        return 2 if device.has_bfloat16 else FLOAT32
    return FLOAT32 if dtype == "float32" else 2


def num_trainable(config: RunConfig, shapes: Shapes) -> int:
    """Weights that learn."""
    if config.method == "full":
        return shapes.num_weights
    if config.method == "prompt_tuning":
        return config.prompt.num_virtual_tokens * shapes.hidden
    if config.method == "prefix_tuning":
        return config.prompt.num_virtual_tokens * 2 * shapes.num_layers * shapes.num_kv_heads * shapes.head_dim
    linears, lora = shapes.targets(config.lora.target_modules), config.lora
    per_layer = sum(lora.rank * (each.num_out + each.num_in) + lora.dora * each.num_out for each in linears)
    return shapes.num_layers * per_layer


def longest_load(config: RunConfig, device: Device) -> Load:
    """The most that a step can be, where nothing is known of the data: every example as long as may be."""
    count, length = config.train.micro_batch_size, config.data.max_length
    return make_load(config, device, [length] * count, length, count * (length - 1), config.examples_per_step * length)


def make_load(
    config: RunConfig,
    device: Device,
    lines: Sequence[int],
    longest: int,
    num_trained: int,
    tokens_per_step: float,
    basis: Basis = "longest",
    varies: bool = True,
) -> Load:
    """The load of a micro-batch with these lines (their tokens), as the trainer lays it out.

    Lines follow one another in one row without padding, on a CPU in several rows of ROW_TOKENS. Behind virtual tokens
    each line is a row of its own, padded.
    """
    if config.method in VIRTUAL_METHODS:
        width = max(lines) + config.prompt.num_virtual_tokens
        return Load(len(lines), width, longest, num_trained, tokens_per_step, basis, varies)
    width = sum(lines)
    if device.kind == "cpu" and config.distributed.world_size == 1:
        width = min(width, max(ROW_TOKENS, *lines))
    return Load(1, width, longest, min(num_trained, width), tokens_per_step, basis, varies)


@dataclass(frozen=True)
class Kept:
    """What a layer keeps for its backward pass: numbers per token in the widths of a model.

    `wide` are float32 numbers of the hidden size (the input of a norm), the others are in the format of the run.
    """

    wide: float
    hidden: float
    queries: float
    keys: float
    intermediate: float
    rank: float


# Of "adapter", what a layer's nodes keep (engine/parts.py: the tensors of `kept`, and the room for A beside each
# joined product); of the others, counted with saved_tensors_hooks on the starter in bfloat16, 255 tokens in a row, and
# 432 for layers with dropout or DoRA, which PEFT computes: the first keep the inputs that were dropped and which, the
# second three forms of each result.
KEPT = {
    "full": Kept(wide=4, hidden=4, queries=2, keys=2, intermediate=4, rank=0),
    "adapter": Kept(wide=0, hidden=4, queries=2, keys=2, intermediate=3, rank=11),
    "dropout": Kept(wide=0, hidden=11, queries=2, keys=2, intermediate=4, rank=11),
    "dora": Kept(wide=0, hidden=10.5, queries=5, keys=8.5, intermediate=9.5, rank=11),
    "virtual": Kept(wide=0, hidden=2, queries=2, keys=2, intermediate=3, rank=0),
}
# Attention in blocks keeps its weights up to so many keys a token on average, those of blocks that are computed as one
# padded to one size (up to PADDING of engine/blocks.py).
BLOCK_TOKENS, KEPT_KEYS, BLOCK_PADDING = 128, 512, 1.2
# While a layer's gradient is formed, these many numbers of its widest part are there at once.
BACKWARD_INTERMEDIATES = 3
# Of each logit of a head that learns, at the peak: the number, its float32 form, log-softmax and gradient, and the
# gradient again. A frozen head turns its logits into their gradient in place.
LOGIT_NARROW, LOGIT_WIDE = 2, 3


@dataclass(frozen=True)
class Overhead:
    """What a process holds beside tensors: `fixed` bytes, a share of the tensors' bytes lost to the allocator, and,
    where passes vary, `kernels` more and a share of the activations, `holes`, that the next pass cannot use."""

    fixed: int
    share: float = 0.0
    kernels: int = 0
    holes: float = 0.0


OVERHEAD = {
    # Kernels that oneDNN compiles for the lengths of rows: 60 MB where all are alike, up to 195 MB (256 of them, see
    # engine/environment.py). Tensors live in an arena (engine/cpu/arena.h) that a pass like the last fills as that did.
    "cpu": Overhead(fixed=600 * MIB, kernels=125 * MIB, holes=0.25),
    "cuda": Overhead(fixed=550 * MIB, share=0.08),  # context and libraries of CUDA 12; not measured here
}


# Without compiled layers tensors are in the heap of glibc: 1.02 to 1.34 times as much in 30 runs, on average 1.13.
HEAP_SHARE = 0.13


def is_in_heap(config: RunConfig, device: Device) -> bool:
    """Whether tensors have no arena of their own on this processor."""
    return device.kind == "cpu" and (config.train.compile == "off" or not device.has_compiler)


def memory(config: RunConfig, shapes: Shapes, load: Load, device: Device) -> Memory:
    """Bytes that a step of this config holds at its peak: on a GPU its memory, on a CPU the process's resident set.

    Gradient checkpointing that is not decided yet (`settled`) counts as off.
    Squeezing a base into 4 bits is no peak: matrix after matrix is read from the mapped file and given back (see
    engine/allocator.py), and the file's own pages are the system's to take back.
    """
    number, learning = number_bytes(config, device), num_trainable(config, shapes)
    is_full, is_quantised = config.method == "full", config.method == "qlora"
    optimizer = ADAMW_BYTES if config.train.optimizer == "adamw" else ADAMW_8BIT_BYTES
    rest = (shapes.num_weights - (shapes.num_linear if is_quantised else 0)) * (FLOAT32 if is_full else number)
    logit = LOGIT_NARROW * number + LOGIT_WIDE * FLOAT32 if is_full else number
    checkpoints = config.train.gradient_checkpointing is True
    activations = _activations(config, shapes, load, number, device.kind, checkpoints)
    logits = min(load.num_trained, HEAD_ROWS) * shapes.vocabulary * logit
    gradients = learning * FLOAT32
    if is_full and not checkpoints:  # they come as activations go: few are there beside all of those
        last = _activations(config, shapes, load, number, device.kind, True)
        gradients = max(shapes.vocabulary * shapes.hidden * FLOAT32, round(gradients + last - activations))
    parts = {
        "weights": rest + (shapes.num_linear * NF4_BYTES if is_quantised else 0),
        "quantisation": shapes.num_linear * NF4_CONSTANT_BYTES if is_quantised else 0,
        "adapter": 0 if is_full else learning * FLOAT32,
        "gradients": gradients,
        "optimizer": learning * optimizer,
        "activations": activations,
        "logits": logits,
    }
    if device.kind == "cuda" and config.records_passes:  # passes that were recorded keep what they compute with
        parts |= {"activations": 2 * activations, "logits": 2 * logits}
    parts = _shared_out(parts, config, shapes, number, device.kind)
    cost = OVERHEAD[device.kind]
    overhead = cost.fixed + cost.share * sum(parts.values())
    if load.varies:
        overhead += cost.kernels + cost.holes * parts["activations"]
    if is_full and device.kind == "cpu" and (load.varies or load.tokens_per_step > 1.5 * load.num_tokens):
        # The embedding's gradient twice more, from the head and from the input, while a pass adds to that of the last.
        overhead += 2 * shapes.vocabulary * shapes.hidden * FLOAT32
    if is_in_heap(config, device):
        overhead += HEAP_SHARE * (sum(parts.values()) + overhead)
    return Memory(**{name: round(size) for name, size in parts.items()}, overhead=round(overhead))


MARGIN = 0.15  # what a prediction is allowed to be off by


@dataclass(frozen=True)
class Twice:
    """Whether activations are computed twice. Bytes of one process: what it takes `without`, what `computed_twice`, and
    what it may take (`budget`)."""

    is_on: bool
    without: int
    computed_twice: int
    budget: int

    @property
    def chosen(self) -> int:
        """Bytes that it takes so."""
        return self.computed_twice if self.is_on else self.without


def twice(config: RunConfig, shapes: Shapes, load: Load, device: Device, budget: int) -> Twice:
    """What train.gradient_checkpointing auto comes to: on where a process might need more than `budget` bytes without
    it, and needs less with it. Else it is as configured."""
    cannot = config.method == "prefix_tuning"
    both = (changed(config, {"train.gradient_checkpointing": is_on and not cannot}) for is_on in (False, True))
    without, with_it = (memory(each, shapes, load, device).total for each in both)
    wanted = config.train.gradient_checkpointing
    is_needed = without * (1 + MARGIN) > budget and with_it < without
    return Twice(is_needed if wanted == "auto" else wanted, without, with_it, budget)


def settled(config: RunConfig, shapes: Shapes, load: Load, device: Device, budget: int) -> RunConfig:
    """The config with gradient checkpointing decided, where it is auto; see `twice`."""
    if config.train.gradient_checkpointing != "auto":
        return config
    return changed(config, {"train.gradient_checkpointing": twice(config, shapes, load, device, budget).is_on})


# DDP adds up gradients in pieces of this many numbers, as in the trainer; DeepSpeed fills two buckets in turn.
BUCKET_ELEMENTS, NUM_BUCKETS = 8 * MIB, 2
LIVE_WEIGHTS = 10**9  # with ZeRO-3: weights that are put together keep so many numbers, DeepSpeed's default


def _shared_out(parts: dict[str, float], config: RunConfig, shapes: Shapes, number: int, kind: str) -> dict[str, float]:
    """What one of several processes holds: DDP has all of it in each, ZeRO a share.

    ZeRO-1 shares out the optimizer, ZeRO-2 the gradients too, ZeRO-3 also the weights. See DeepSpeed's
    `stage_1_and_2.py` and `stage3.py`, and https://deepspeed.readthedocs.io/en/latest/memory.html.
    """
    spread, learning = config.distributed, num_trainable(config, shapes)
    if spread.strategy == "none":
        return parts
    if spread.strategy == "ddp":
        return parts | {"gradients": parts["gradients"] + min(learning, BUCKET_ELEMENTS) * FLOAT32}
    values, world = zero.chosen(config), spread.world_size
    stage = zero.stage_of(values)
    own = number if config.method == "full" else FLOAT32  # a whole model is kept in the run's own numbers
    weights, adapter = parts["weights"] * (own / FLOAT32 if config.method == "full" else 1), parts["adapter"]
    gradients = learning * own / (world if stage >= 2 else 1)
    optimizer = learning * (FLOAT32 + ADAMW_BYTES) / (world if stage else 1)
    if stage == 3:
        share = 0 if kind == "cuda" and zero.offloads(values, "param") else 1 / world
        weights, adapter = weights * share + min(weights, LIVE_WEIGHTS * number), adapter * (share + 1)
    if kind == "cuda" and zero.offloads(values, "optimizer"):
        optimizer = gradients = 0
    buckets = NUM_BUCKETS * zero.bucket_size(values, learning) * own if stage else 0
    return parts | {"weights": weights, "adapter": adapter, "gradients": gradients + buckets, "optimizer": optimizer}


def processes_on(config: RunConfig, device: Device) -> int:
    """Processes that share a device's memory: a GPU has one, a processor all of its machine."""
    return config.distributed.processes_per_node if device.kind == "cpu" else 1


def _activations(config: RunConfig, shapes: Shapes, load: Load, number: int, kind: str, checkpoints: bool) -> float:
    """What the forward pass leaves for the backward one, with the copies of weights that a layer computes with."""
    is_full = config.method == "full"
    attention = _attention_bytes(config, shapes, load, number, kind)
    kept = load.num_tokens * (_kept_bytes(config, shapes, number) + attention)
    working = load.num_tokens * shapes.intermediate * BACKWARD_INTERMEDIATES * number
    cast = (shapes.num_linear if is_full else num_trainable(config, shapes)) * (number if number < FLOAT32 else 0)
    dequantised = shapes.largest_linear * number if config.method == "qlora" else 0
    if not checkpoints:
        return shapes.num_layers * kept + working + cast + dequantised
    border = load.num_tokens * shapes.hidden * (FLOAT32 if is_full else number)
    return shapes.num_layers * border + kept + working + cast / shapes.num_layers + dequantised


def _kept_bytes(config: RunConfig, shapes: Shapes, number: int) -> float:
    """Bytes that one layer keeps of one token, attention between tokens aside."""
    kept = KEPT[_kind_of_layers(config)]
    narrow = (
        kept.hidden * shapes.hidden
        + kept.queries * shapes.num_heads * shapes.head_dim
        + kept.keys * shapes.num_kv_heads * shapes.head_dim
        + kept.intermediate * shapes.intermediate
        + kept.rank * config.lora.rank
    )
    return FLOAT32 * kept.wide * shapes.hidden + number * narrow


def _kind_of_layers(config: RunConfig) -> str:
    if config.method in VIRTUAL_METHODS:
        return "virtual"
    if config.method == "full":
        return "full"
    return "dora" if config.lora.dora else "dropout" if config.lora.dropout else "adapter"


def _attention_bytes(config: RunConfig, shapes: Shapes, load: Load, number: int, kind: str) -> float:
    """Bytes that the attention of one layer keeps of one token: its sum, or its weights for the tokens it sees."""
    if config.model.attention == "eager":
        return shapes.num_heads * load.width * (FLOAT32 + number)
    keys = load.longest / 2 + BLOCK_TOKENS / 2
    is_blocks = kind == "cpu" and config.model.attention in ("auto", "blocks") and config.method not in VIRTUAL_METHODS
    return shapes.num_heads * (BLOCK_PADDING * keys * number if is_blocks and keys <= KEPT_KEYS else FLOAT32)


def disk(config: RunConfig, shapes: Shapes, num_steps: int = 0) -> Disk:
    """Bytes on the disk: a new checkpoint lies beside those that are kept, the best one among them.

    `num_steps` of the run, 0 where they are not known: how many checkpoints there can be.
    """
    learning = num_trainable(config, shapes)
    state = ADAMW_BYTES if config.train.optimizer == "adamw" else ADAMW_8BIT_BYTES
    checkpoint = learning * (FLOAT32 + state + _saved_twice(config))
    model = shapes.num_weights * 2
    is_full = config.method == "full"
    converted = model if is_full else learning * FLOAT32
    at_once = _most_checkpoints(config.record, num_steps or config.train.num_steps or 0)
    return Disk(checkpoint, checkpoint * at_once, converted, 0 if is_full else model)


def _most_checkpoints(record: RecordSection, num_steps: int) -> int:
    """Fewer than are kept where the steps are counted and neither the time nor a new best one adds to them."""
    most = record.keep_last + 1
    if num_steps and not record.save_every_minutes and record.best_by == "none":
        return min(most, -(-num_steps // (record.save_every_steps or num_steps)))
    return most + (record.best_by != "none")


def _saved_twice(config: RunConfig) -> int:
    """Bytes of a weight that DeepSpeed saves beside its master: as the model computes with it, but for ZeRO-3."""
    if config.distributed.strategy != "deepspeed" or zero.stage_of(zero.chosen(config)) == 3:
        return 0
    return 2 if config.method == "full" and config.model.dtype != "float32" else FLOAT32


SHORTEST_LENGTH, SMALLEST_RANK = 128, 4


def suggestions(config: RunConfig, shapes: Shapes, load_of: LoadOf, device: Device, budget: int) -> list[Suggestion]:
    """Ways to make a config smaller, each on top of the one before, up to the first that fits into `budget` bytes.

    The bytes are those of one process.

    In order of what they cost the result: the micro-batch (the same rows a step), gradient checkpointing, a 4-bit
    base, shorter sequences, a lower rank. Empty when the config fits as it is.
    """
    found: list[Suggestion] = []
    settings: dict[str, Any] = {}
    config = settled(config, shapes, load_of(config), device, budget)
    smallest = memory(config, shapes, load_of(config), device).total
    for change in _changes(config):
        if smallest <= budget:
            break
        settings = settings | change
        made = changed(config, settings)
        size = memory(made, shapes, load_of(made), device)
        if size.total < smallest:  # fewer rows in a micro-batch help only where there were more
            found.append(Suggestion(dict(settings), size, size.total <= budget))
            smallest = size.total
    return found


def _changes(config: RunConfig) -> Iterator[dict[str, Any]]:
    train = config.train
    for most in _halves(train.micro_batch_size, 1):
        size, steps = config.micro_batches(most)
        yield {"train.micro_batch_size": size, "train.gradient_accumulation_steps": steps}
    if train.gradient_checkpointing is not True and config.method != "prefix_tuning":
        yield {"train.gradient_checkpointing": True}
    if config.method in ("full", "lora"):
        yield {"method": "qlora"}
    for length in _halves(config.data.max_length, SHORTEST_LENGTH):
        yield {"data.max_length": length}
    for rank in _halves(config.lora.rank, SMALLEST_RANK) if config.method not in VIRTUAL_METHODS else ():
        yield {"lora.rank": rank}


def _halves(number: int, least: int) -> Iterator[int]:
    """8 -> 4, 2, 1."""
    while number // 2 >= least:
        number //= 2
        yield number


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """`config` with settings by dotted name."""
    values = config.model_dump(mode="json")
    for path, value in settings.items():
        section, _, name = path.rpartition(".")
        (values[section] if section else values)[name] = value
    return parse_config(values)


SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """'8GB' -> 8 * 2**30: a card of 8 GB has that. Raises ConfigError for what is no size."""
    match = SIZE.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError([Problem("memory", f"is no size: {text!r}", "8GB, 512MB")], "estimate")
    return round(float(match[1]) * 1024 ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))
