"""The planner's arithmetic: known figures, and that more of anything never needs less memory."""

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio import estimate
from studio.config import zero
from studio.config.schema import RunConfig, parse_config
from studio.data import packing
from studio.engine import blocks, head
from studio.errors import ConfigError
from studio.estimate import GIB, Load, longest_load, memory, suggestions
from studio.machine import Device, card
from studio.model_shapes import Shapes, shapes_of
from tests.test_model_shapes import LLAMA_2_7B

SEVEN_B = shapes_of(LLAMA_2_7B)
CPU = Device("cpu", "", 16 * GIB, has_bfloat16=True)
CARD = card(8 * GIB)
SMALL = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 512, "vocab_size": 1000,
}  # fmt: skip


CHECKPOINTED = {"train__gradient_checkpointing": True}


def config(method: str = "lora", **settings: Any) -> RunConfig:
    values: dict[str, Any] = {"method": method}
    for path, value in settings.items():
        section, _, name = path.partition("__")
        values.setdefault(section, {})[name] = value
    return parse_config(values)


def tight(method: str, **settings: Any) -> RunConfig:
    """Micro-batch 1 with checkpointing, 512 tokens."""
    return config(method, train__micro_batch_size=1, train__gradient_checkpointing=True, **settings)


def needs(each: RunConfig, shapes: Shapes = SEVEN_B, device: Device = CARD) -> int:
    return memory(each, shapes, longest_load(each, device), device).total


def on_card(each: RunConfig) -> Load:
    return longest_load(each, CARD)


def test_a_7b_qlora_at_512_tokens_fits_on_a_card_of_8_gb() -> None:
    assert needs(tight("qlora")) < 6.5 * GIB
    assert needs(tight("qlora")) > 4.3 * GIB  # the floor: weights, constants, borders of layers, one layer


def test_a_7b_qlora_needs_little_more_on_a_processor_and_far_less_than_lora() -> None:
    """The base is squeezed matrix by matrix: it is never there whole."""
    assert needs(tight("qlora"), device=CPU) < needs(tight("qlora"), device=CARD) + GIB
    assert needs(tight("qlora"), device=CPU) < needs(tight("lora"), device=CPU) / 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_7b_in_16_bits_does_not(method: str) -> None:
    assert needs(tight(method)) > 12.5 * GIB


def test_the_parts_of_a_7b_qlora_are_what_its_format_says() -> None:
    found = memory(tight("qlora", lora__rank=8), SEVEN_B, longest_load(tight("qlora"), CARD), CARD)
    linear, rest = SEVEN_B.num_linear, SEVEN_B.num_weights - SEVEN_B.num_linear
    assert found.weights == linear // 2 + rest * 2
    assert found.weights + found.quantisation == pytest.approx(3.11 * GIB + 0.49 * GIB, rel=0.01)
    learning = 32 * 8 * (4 * 8192 + 3 * (4096 + 11008))
    assert (found.adapter, found.gradients, found.optimizer) == (learning * 4, learning * 4, learning * 8)


def test_full_training_keeps_four_numbers_of_every_weight() -> None:
    found = memory(tight("full"), SEVEN_B, longest_load(tight("full"), CARD), CARD)
    assert found.weights + found.gradients + found.optimizer == SEVEN_B.num_weights * 16
    assert found.adapter == found.quantisation == 0


def test_only_the_named_modules_learn() -> None:
    two = config(lora__target_modules="q_proj,v_proj", lora__rank=16)
    assert estimate.num_trainable(two, SEVEN_B) == 32 * 2 * 16 * (4096 + 4096)


def test_eager_attention_keeps_a_weight_for_every_pair_of_tokens() -> None:
    eager, lean = config(model__attention="eager"), config(model__attention="sdpa")
    load = Load(2, 1000, 1000, 100, 2000)
    more = memory(eager, SEVEN_B, load, CARD).activations - memory(lean, SEVEN_B, load, CARD).activations
    assert more == pytest.approx(32 * 32 * 2 * 1000 * 1000 * (4 + 2), rel=0.01)


def test_the_head_is_asked_in_the_trainers_pieces() -> None:
    assert (estimate.HEAD_ROWS, estimate.ROW_TOKENS) == (head.HEAD_ROWS, packing.TREE_NODES)
    assert (estimate.BLOCK_TOKENS, estimate.KEPT_KEYS) == (blocks.BLOCK_TOKENS, blocks.KEPT_KEYS)
    few, many = (memory(config(), SEVEN_B, Load(1, 4000, 4000, n, 4000), CARD).logits for n in (256, 4000))
    assert few == many


def spread(strategy: str, world: int, method: str = "full") -> RunConfig:
    kind = "ddp" if strategy == "ddp" else "deepspeed"
    zero = {"distributed__deepspeed": strategy} if kind == "deepspeed" else {}
    return tight(method, distributed__strategy=kind, distributed__processes_per_node=world, **zero)


def of_each(each: RunConfig) -> estimate.Memory:
    return memory(each, SEVEN_B, longest_load(each, CARD), CARD)


def test_zero_shares_out_what_its_stages_say() -> None:
    """A whole model in 16 bits: 2 bytes of a weight and of its gradient, 12 for its master and moments."""
    number, world = SEVEN_B.num_weights, 8
    buckets = 2 * zero.LARGEST_BUCKET * 2
    one, two, three = (of_each(spread(name, world)) for name in ("zero1", "zero2", "zero3"))
    assert (one.weights, two.weights) == (2 * number, 2 * number)
    assert three.weights == round(2 * number / world + 2 * estimate.LIVE_WEIGHTS)
    assert (one.gradients, two.gradients) == (2 * number + buckets, round(2 * number / world) + buckets)
    assert one.optimizer == two.optimizer == three.optimizer == round(12 * number / world)
    assert three.total < two.total < one.total < of_each(spread("ddp", world)).total


def test_what_waits_in_main_memory_is_not_on_the_card() -> None:
    two, three = of_each(spread("zero2_offload", 8)), of_each(spread("zero3_offload", 8))
    assert two.optimizer == three.optimizer == 0 and three.weights == 2 * estimate.LIVE_WEIGHTS
    assert memory(spread("zero2_offload", 8), SEVEN_B, longest_load(config(), CPU), CPU).optimizer > 0


def test_more_processes_never_need_more_each() -> None:
    for name in ("zero1", "zero2", "zero3"):
        sizes = [of_each(spread(name, world, "lora")).total for world in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)
    assert estimate.processes_on(spread("zero2", 4), CPU) == 4 and estimate.processes_on(spread("zero2", 4), CARD) == 1


lengths = st.integers(1, 64).map(lambda n: n * 16)
configs = st.builds(
    lambda method, micro, checkpointing, rank, attention, optimizer: config(
        method,
        train__micro_batch_size=micro,
        train__gradient_checkpointing=checkpointing,
        train__optimizer=optimizer,
        lora__rank=rank,
        model__attention=attention,
    ),
    st.sampled_from(["lora", "qlora", "full"]),
    st.integers(1, 32),
    st.booleans(),
    st.integers(1, 256),
    st.sampled_from(["sdpa", "eager"]),
    st.sampled_from(["adamw", "adamw_8bit"]),
)


@given(configs, lengths, st.sampled_from([CPU, CARD]))
def test_more_never_needs_less(each: RunConfig, length: int, device: Device) -> None:
    shapes = shapes_of(SMALL)

    def of(changed: dict[str, Any]) -> int:
        made = estimate.changed(each, {"data.max_length": length, **changed})
        return memory(made, shapes, longest_load(made, device), device).total

    now = of({})
    more = of({"train.micro_batch_size": each.train.micro_batch_size + 1}), of({"data.max_length": length + 16})
    assert min(more) >= now  # not above: a processor takes a large micro-batch in parts
    if device is CARD and each.method != "full":
        assert min(more) > now
    assert of({"lora.rank": each.lora.rank + 1}) >= now
    assert of({"train.gradient_checkpointing": True}) <= of({"train.gradient_checkpointing": False})
    assert of({"train.optimizer": "adamw_8bit"}) <= of({"train.optimizer": "adamw"})
    assert of({"model.attention": "sdpa"}) <= of({"model.attention": "eager"})
    assert all(size >= 0 for size in asdict(memory(each, shapes, longest_load(each, device), device)).values())


@given(configs)
def test_a_larger_model_never_needs_less(each: RunConfig) -> None:
    for name in SMALL.keys() - {"model_type", "num_attention_heads"}:
        larger = shapes_of({**SMALL, name: SMALL[name] * 2})
        assert needs(each, larger) > needs(each, shapes_of(SMALL))


def test_suggestions_come_in_order_and_end_with_what_fits() -> None:
    found = suggestions(config("lora"), SEVEN_B, on_card, CARD, 8 * GIB)
    assert [way.fits for way in found] == [False] * (len(found) - 1) + [True]
    sizes = [way.memory.total for way in found]
    assert sizes == sorted(sizes, reverse=True)
    last = estimate.changed(config("lora"), found[-1].settings)
    assert (last.method, last.train.micro_batch_size, last.train.gradient_checkpointing) == ("qlora", 1, True)
    assert last.examples_per_step == config("lora").examples_per_step
    assert last.data.max_length == 512 and needs(last) <= 8 * GIB


@pytest.mark.parametrize("spread", [{}, {"distributed__strategy": "ddp", "distributed__processes_per_node": 2}])
@pytest.mark.parametrize(("micro", "accumulation"), [(8, 2), (5, 1), (6, 3)])
def test_no_suggestion_changes_the_rows_of_a_step(spread: dict[str, Any], micro: int, accumulation: int) -> None:
    whole = config(train__micro_batch_size=micro, train__gradient_accumulation_steps=accumulation, **spread)
    found = [estimate.changed(whole, way.settings) for way in suggestions(whole, SEVEN_B, on_card, CARD, GIB)]
    assert found and {each.examples_per_step for each in found} == {whole.examples_per_step}


def test_shorter_rows_and_a_lower_rank_come_last() -> None:
    found = suggestions(tight("qlora", lora__rank=64), SEVEN_B, on_card, CARD, 5 * GIB)
    names = [list(way.settings)[-1] for way in found]
    assert names[:2] == ["data.max_length"] * 2 and names[2:] == ["lora.rank"] * len(names[2:])


def test_nothing_is_suggested_for_what_fits_and_nothing_fits_into_nothing() -> None:
    assert suggestions(tight("qlora"), SEVEN_B, on_card, CARD, 8 * GIB) == []
    assert not any(way.fits for way in suggestions(config(), SEVEN_B, on_card, CARD, GIB))


def test_disk() -> None:
    adapter, full = (estimate.disk(config(method), SEVEN_B) for method in ("lora", "full"))
    learning = estimate.num_trainable(config("lora"), SEVEN_B)
    assert adapter.checkpoint == learning * 12 and adapter.checkpoints == 3 * adapter.checkpoint
    assert adapter.converted == learning * 4 and adapter.merged == SEVEN_B.num_weights * 2
    assert full.checkpoint == SEVEN_B.num_weights * 12 and full.merged == 0


@pytest.mark.parametrize(
    ("record", "num_steps", "most"),
    [
        ({"keep_last": 1000, "save_every_steps": 500, "save_every_minutes": 0}, 4000, 8),
        ({"keep_last": 1000, "save_every_steps": 500, "save_every_minutes": 0}, 4001, 9),
        ({"keep_last": 2, "save_every_steps": 500, "save_every_minutes": 0}, 4000, 3),
        ({"keep_last": 2, "save_every_steps": 0, "save_every_minutes": 0}, 4000, 1),
        ({"keep_last": 2, "save_every_steps": 0, "save_every_minutes": 2}, 4000, 3),
        ({"keep_last": 5, "save_every_steps": 500, "save_every_minutes": 0, "best_by": "valid_loss"}, 1000, 7),
        ({"keep_last": 1000, "save_every_steps": 500, "save_every_minutes": 0}, 0, 1001),
    ],
)
def test_no_more_checkpoints_lie_there_than_a_run_saves(record: dict[str, Any], num_steps: int, most: int) -> None:
    """Configs of XTuner may keep every one of a run that saves every 500 steps."""
    settings = {f"record__{name}": value for name, value in record.items()}
    own = config(train__num_steps=None, train__num_epochs=1, **settings)
    found = estimate.disk(own, SEVEN_B, num_steps)
    assert found.checkpoints == most * found.checkpoint


@pytest.mark.parametrize(
    ("strategy", "method", "size"),
    [("zero2", "lora", 16), ("zero3", "lora", 12), ("zero1", "full", 14), ("ddp", "full", 12)],
)
def test_deepspeed_saves_what_the_model_computes_with_beside_the_masters(strategy: str, method: str, size: int) -> None:
    each = spread(strategy, 2, method)
    assert estimate.disk(each, SEVEN_B).checkpoint == estimate.num_trainable(each, SEVEN_B) * size


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * GIB), ("512 MiB", 512 * 2**20), ("1.5g", 3 * GIB // 2)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert estimate.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-8GB", "0", "8GBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        estimate.parse_bytes(text)


def test_passes_that_are_recorded_are_there_twice_on_a_card_that_records() -> None:
    plain, recorded = (memory_of(config(train__cuda_graph=graph), CARD) for graph in ("off", "auto"))
    assert recorded.activations == 2 * plain.activations and recorded.logits == 2 * plain.logits
    assert needs(config(train__cuda_graph="auto"), device=CPU) == needs(config(), device=CPU)
    refused = config(train__cuda_graph="auto", lora__dropout=0.1)
    assert memory_of(refused, CARD) == memory_of(config(lora__dropout=0.1), CARD)


def test_layers_that_peft_computes_keep_more_and_passes_that_vary_leave_holes() -> None:
    plain, dropped, dora = (
        memory_of(config(**own), CPU).activations for own in ({}, {"lora__dropout": 0.1}, {"lora__dora": True})
    )
    assert plain < dropped < dora
    loads = [
        Load(1, 1024, 512, 1000, tokens, True, varies)
        for tokens, varies in ((1024, False), (2048, False), (2048, True))
    ]
    one, several, varied = (memory(config(), SEVEN_B, load, CPU) for load in loads)
    assert one == several and one.activations == varied.activations and one.overhead < varied.overhead
    one, several, varied = (memory(config(method="full"), SEVEN_B, load, CPU) for load in loads)
    assert one.overhead < several.overhead < varied.overhead


def memory_of(each: RunConfig, device: Device) -> estimate.Memory:
    return memory(each, SEVEN_B, longest_load(each, device), device)


def test_gradient_checkpointing_is_left_to_memory_where_it_is_auto() -> None:
    each = config("lora", train__gradient_checkpointing="auto")
    needed = needs(config("lora"))
    found = [estimate.twice(each, SEVEN_B, on_card(each), CARD, budget) for budget in (needed, 2 * needed)]
    assert [choice.is_on for choice in found] == [True, False]  # it would fit by a hair, which is no fit
    assert found[0].without == needed > found[0].computed_twice == needs(config("lora", **CHECKPOINTED))
    assert estimate.settled(each, SEVEN_B, on_card(each), CARD, needed) == config("lora", **CHECKPOINTED)
    assert estimate.settled(each, SEVEN_B, on_card(each), CARD, 2 * needed) == config("lora")
    chosen = config("lora", **CHECKPOINTED)
    assert estimate.settled(chosen, SEVEN_B, on_card(each), CARD, 2 * needed) is chosen
    cannot = config("prefix_tuning", train__gradient_checkpointing="auto")
    assert not estimate.twice(cannot, SEVEN_B, on_card(cannot), CARD, 1).is_on


def test_what_is_suggested_counts_on_the_checkpointing_that_memory_asks_for() -> None:
    """It comes by itself, so it is no suggestion."""
    found = suggestions(config("lora", train__gradient_checkpointing="auto"), SEVEN_B, on_card, CARD, 8 * GIB)
    assert found[-1].fits and "train.gradient_checkpointing" not in found[-1].settings


def test_without_compiled_layers_a_processor_takes_more() -> None:
    bare = Device("cpu", "", 16 * GIB, has_bfloat16=True, has_compiler=False)
    whole = needs(config(), device=CPU)
    assert needs(config(), device=bare) == pytest.approx((1 + estimate.HEAP_SHARE) * whole, rel=1e-6)
    assert needs(config(train__compile="off"), device=CPU) == needs(config(), device=bare)
    assert needs(config(train__compile="off"), device=CARD) == needs(config(), device=CARD)
