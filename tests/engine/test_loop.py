"""The arithmetic of a step: however examples are split and packed, loss and gradient are those of one big batch."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from studio.config.schema import RunConfig, TrainSection
from studio.data.packing import close_rooms
from studio.data.tokens import IGNORE_INDEX, Example, encode_conversation
from studio.engine import adapters, devices, head
from studio.engine.circumstances import weights_sha256
from studio.engine.forward import Forward
from studio.engine.generate import generate
from studio.engine.loop import NotFiniteError, Trainer, learning_rate, warmup_steps
from studio.engine.models.load import LoadedModel
from studio.errors import ConfigError
from tests.engine.conftest import conversations

GOLDEN = Path(__file__).with_name("golden_losses.json")
Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]


def encode(loaded: LoadedModel, num_rows: int = 12) -> list[Example]:
    rows = conversations(num_rows)
    return [encode_conversation(row, loaded.template, loaded.tokenizer, 128) for row in rows]


def make_trainer(loaded: LoadedModel, config: RunConfig, dtype: torch.dtype = torch.float32) -> Trainer:
    devices.seed_all(0)
    model = adapters.attach(loaded, config)
    wake_adapters(model)
    return Trainer(model, config, dtype, num_steps=config.train.num_steps or 10, pad_id=loaded.pad_id)


def wake_adapters(model: torch.nn.Module) -> None:
    """A fresh adapter has B = 0, so A has no gradient to compare."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def reference(loaded: LoadedModel, model: torch.nn.Module, examples: list[Example]) -> tuple[float, list[Tensor]]:
    """Loss and gradients from one padded batch, full logits and torch's own mean over trained tokens."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.tensor([each.input_ids + [0] * (width - len(each.input_ids)) for each in examples])
    labels = torch.tensor([each.labels + [IGNORE_INDEX] * (width - len(each.labels)) for each in examples])
    seen = torch.tensor([[1] * len(each.input_ids) + [0] * (width - len(each.input_ids)) for each in examples])
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=seen).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in adapters.trainable_parameters(model)]


def step_gradients(trainer: Trainer, examples: list[Example]) -> tuple[float, list[Tensor]]:
    """Those of a real step, whose learning rate is so small that weights stay as they are."""
    loss = trainer.step(examples, 1).loss
    return loss, gradients(trainer.model)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_rows_that_are_filled_up_have_the_same_loss_and_gradient(
    load_tiny: Load, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found = []
    for room in (None, close_rooms):
        monkeypatch.setattr(Forward, "_room", lambda *_, room=room: room)
        loaded = load_tiny()
        trainer = make_trainer(loaded, tiny_config(method=method))
        sizes = [batch.input_ids.numel() for batch in trainer.forward.batches(encode(loaded), 4)]
        found.append((sizes, *step_gradients(trainer, encode(loaded))))
    (sizes, loss, gradients), (filled, filled_loss, filled_gradients) = found
    assert filled == [close_rooms(size) for size in sizes] and filled != sizes
    assert filled_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(filled_gradients, gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * max(1e-3, float(other.norm()))


@pytest.mark.parametrize(("dtype", "are_filled"), [(torch.bfloat16, True), (torch.float32, False)])
def test_rows_of_16_bits_are_filled_up_on_a_processor(
    load_tiny: Load, tiny_config: Make, dtype: torch.dtype, are_filled: bool
) -> None:
    """Examples of 40 lengths make rows of few sizes, one of which oneDNN has seen before."""
    trainer = make_trainer(load_tiny(dtype=dtype), tiny_config(), dtype)
    examples = [Example(list(range(2, length)), list(range(2, length))) for length in range(70, 110)]
    sizes = {trainer.forward.batches([each], 1)[0].input_ids.numel() for each in examples}
    assert len(sizes) == (11 if are_filled else 40)


SPLITS = [
    {"data.pack": "none", "train.micro_batch_size": 12, "train.gradient_accumulation_steps": 1},
    {"data.pack": "none", "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 12},
    {"data.pack": "none", "train.micro_batch_size": 5, "train.gradient_accumulation_steps": 3},
    {"data.pack": "tree", "train.micro_batch_size": 1},
    {"data.pack": "tree", "train.micro_batch_size": 4},
    {"data.pack": "tree", "data.max_length": 500, "train.micro_batch_size": 4},
    {"data.pack": "tree", "model.attention": "eager", "train.micro_batch_size": 4},
    {"data.pack": "tree", "model.attention": "sdpa", "train.micro_batch_size": 4},
    {"data.pack": "sequence", "data.max_length": 500, "train.micro_batch_size": 1},
    {"data.pack": "sequence", "train.micro_batch_size": 4},
    {"data.pack": "sequence", "model.attention": "eager"},
    {"data.pack": "tree", "train.gradient_checkpointing": True},
    {"data.pack": "tree", "train.offload_activations": True},
]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: ",".join(f"{k}={v}" for k, v in split.items()))
def test_every_split_has_the_gradient_of_one_big_batch(
    load_tiny: Load, tiny_config: Make, method: str, split: dict
) -> None:
    config = tiny_config(method=method, **{"train.learning_rate": 1e-30, "train.max_grad_norm": 0.0, **split})
    loaded = load_tiny(attention=config.model.attention)
    examples = encode(loaded)
    trainer = make_trainer(loaded, config)
    assert trainer.packing == split["data.pack"]
    assert trainer.forward.kind == {"auto": "blocks"}.get(config.model.attention, config.model.attention)
    expected_loss, expected = reference(loaded, trainer.model, examples)
    loss, found = step_gradients(trainer, examples)
    assert abs(loss - expected_loss) < 1e-6 * max(1.0, abs(expected_loss)) * 2
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-6 * max(float(other.norm()), 1e-2)


@pytest.mark.parametrize("twice", [False, True])
def test_a_tree_on_a_four_bit_base_has_the_gradient_of_one_big_batch(
    load_tiny: Load, tiny_config: Make, twice: bool
) -> None:
    settings = {"train.learning_rate": 1e-30, "train.max_grad_norm": 0.0, "train.gradient_checkpointing": twice}
    loaded = load_tiny(bits=4)
    examples = encode(loaded)
    trainer = make_trainer(loaded, tiny_config(method="qlora", **settings))
    assert (trainer.packing, trainer.forward.kind) == ("tree", "blocks")
    expected_loss, expected = reference(loaded, trainer.model, examples)
    loss, found = step_gradients(trainer, examples)
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, expected, strict=True))


def test_mean_of_means_would_differ(load_tiny: Load, tiny_config: Make) -> None:
    """The comparison above can tell a wrong normalisation: the common mistake is far outside its tolerance."""
    loaded = load_tiny()
    examples = encode(loaded)
    trainer = make_trainer(loaded, tiny_config(method="full"))
    expected, _ = reference(loaded, trainer.model, examples)
    halves = [reference(loaded, trainer.model, examples[start : start + 6])[0] for start in (0, 6)]
    assert abs(sum(halves) / 2 - expected) > 1e-4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_head_in_pieces_changes_nothing(
    load_tiny: Load, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = tiny_config(method=method, **{"train.learning_rate": 1e-30, "train.max_grad_norm": 0.0})
    whole_loss, whole = step_gradients(make_trainer(load_tiny(), config), encode(load_tiny()))
    monkeypatch.setattr(head, "HEAD_ROWS", 7)
    loss, found = step_gradients(make_trainer(load_tiny(), config), encode(load_tiny()))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(found, whole, strict=True))


def scaled_before(model: torch.nn.Module) -> None:
    """As MiniCPM's hidden states are, between the layers and the head."""
    whole, head = model.forward, model.lm_head.forward

    def forward(**inputs: object) -> object:
        model.lm_head.forward = lambda states: head(states * 3)
        try:
            return whole(**inputs)
        finally:
            model.lm_head.forward = head

    model.forward = forward


def scaled_after(model: torch.nn.Module) -> None:
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 0.5))


def capped(model: torch.nn.Module) -> None:
    """As Gemma 2's logits are, which leaves logits as small as these as they are."""

    def cap(module: torch.nn.Module, inputs: object, output: object) -> None:
        output.logits = 30 * torch.tanh(output.logits / 30)

    model.register_forward_hook(cap)


@pytest.mark.parametrize("change", [scaled_before, scaled_after, capped])
def test_model_without_a_head_apart_uses_its_own_logits(
    load_tiny: Load, tiny_config: Make, change: Callable[[torch.nn.Module], None]
) -> None:
    """A model whose logits are more than head(hidden) is noticed, and its own logits are trained."""
    config = tiny_config(**{"train.learning_rate": 1e-30, "train.max_grad_norm": 0.0})
    loaded = load_tiny()
    change(loaded.model)
    trainer = make_trainer(loaded, config)
    assert not trainer.forward.traits.splits_head
    expected_loss, expected = reference(loaded, trainer.model, encode(loaded))
    loss, found = step_gradients(trainer, encode(loaded))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(found, expected, strict=True))


def test_model_that_leaks_between_packed_examples_is_padded(
    load_tiny: Load, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_tiny()
    embed = loaded.model.get_input_embeddings()
    embed.register_forward_hook(lambda module, inputs, output: output + output.mean(1, keepdim=True))
    trainer = make_trainer(loaded, tiny_config())
    assert not trainer.forward.traits.isolates_packed and trainer.packing == "none"
    assert "pack: none" in capsys.readouterr().out


def test_model_that_cannot_follow_a_tree_is_packed_as_sequences(
    load_tiny: Load, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attention window of its own would be lost under a tree's mask."""
    loaded = load_tiny()
    loaded.model.config.sliding_window = 64
    trainer = make_trainer(loaded, tiny_config())
    assert trainer.packing == "sequence"
    assert "cannot follow a tree" in capsys.readouterr().out


def test_what_computes_is_said_as_it_is(load_tiny: Load, tiny_config: Make) -> None:
    forward = make_trainer(load_tiny(), tiny_config(method="prompt_tuning")).forward
    assert forward.why == "as transformers computes it: virtual tokens stand before every example"
    settings = {"lora.dropout": 0.1, "train.compile": "off"}
    dropping, off = (
        make_trainer(load_tiny(dtype=torch.bfloat16), tiny_config(**each), torch.bfloat16).forward.why_not_compiled
        for each in ({"lora.dropout": 0.1}, settings)
    )
    assert dropping and off == "train.compile is off"
    assert ("autocast" in dropping) == (shutil.which("c++") is not None)


def test_steps_whose_batches_were_made_ahead_are_the_same(load_tiny: Load, tiny_config: Make) -> None:
    examples = encode(load_tiny())
    steps = [examples[number % 3 :: 3] for number in range(5)]
    plain, ahead = (make_trainer(load_tiny(), tiny_config()) for _ in range(2))
    expected = [plain.step(step, number).loss for number, step in enumerate(steps, 1)]
    coming = ahead.ahead(iter([*steps, examples]))
    found = []
    for number in range(1, 6):
        step = next(coming)
        if number == 3:
            ahead.micro_batch_size = plain.micro_batch_size = 1  # memory ran out: they are made again
        found.append(ahead.step(step, number).loss)
    assert found == pytest.approx(expected, rel=1e-5)
    coming.close()


def test_dropout_leaves_the_packing_as_it_was_chosen(load_tiny: Load, tiny_config: Make) -> None:
    assert make_trainer(load_tiny(), tiny_config(**{"lora.dropout": 0.1})).packing == "tree"
    settings = {"lora.dropout": 0.1, "data.pack": "sequence"}
    assert make_trainer(load_tiny(), tiny_config(**settings)).packing == "sequence"


def test_ten_steps_have_the_golden_losses(load_tiny: Load, tiny_config: Make) -> None:
    """Numbers that were right once stay so: any change of data order, loss, clipping or optimizer shows here."""
    loaded = load_tiny()
    config = tiny_config(method="full", **{"train.num_steps": 10, "train.learning_rate": 3e-3})
    examples = encode(loaded)
    trainer = make_trainer(loaded, config)
    found = [trainer.step(examples[number % 3 :: 3], number).loss for number in range(1, 11)]
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found == pytest.approx(expected, rel=2e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sixteen_bits_follow_float32(load_tiny: Load, tiny_config: Make, method: str, narrow: torch.dtype) -> None:
    losses = {}
    for dtype in (torch.float32, narrow):
        loaded = load_tiny(dtype=torch.float32 if method == "full" else dtype)
        trainer = make_trainer(loaded, tiny_config(method=method), dtype)
        assert all(parameter.dtype == torch.float32 for parameter in adapters.trainable_parameters(trainer.model))
        assert trainer.forward.kind == "blocks"
        losses[dtype] = [trainer.step(encode(loaded), number).loss for number in range(1, 5)]
    assert losses[narrow] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[narrow] != losses[torch.float32]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_gradient_that_float16_cannot_hold_is_left_out_and_the_next_one_is_scaled_less(
    load_tiny: Load, tiny_config: Make, method: str
) -> None:
    loaded = load_tiny(dtype=torch.float32 if method == "full" else torch.float16)
    trainer = make_trainer(loaded, tiny_config(method=method), torch.float16)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    examples, before = encode(loaded), weights_sha256(adapters.trainable_state(trainer.model))
    first = trainer.step(examples, 1)
    assert math.isfinite(first.loss) and weights_sha256(adapters.trainable_state(trainer.model)) == before
    for number in range(2, 40):
        after = trainer.step(examples, number)
    assert trainer.scaler.get_scale() < 2.0**32 and math.isfinite(after.grad_norm) and after.loss < first.loss


def test_qlora_learns_on_after_sampling(load_tiny: Load, tiny_config: Make) -> None:
    """On some CPUs bitsandbytes repacks weights when a model generates, and no gradient flows afterwards."""
    loaded = load_tiny(bits=4)
    layers = [module for module in loaded.model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU, whatever this one is
    trainer = make_trainer(loaded, tiny_config(method="qlora", **{"train.learning_rate": 5e-3}))
    examples = encode(loaded)
    before = trainer.step(examples, 1).loss
    options = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "max_new_tokens": 3}
    assert len(generate(trainer.model, [examples[0].input_ids[:5]], **options)[0]) <= 3
    trainer.evaluate(examples[:4])
    assert layers and not any(getattr(each.weight.quant_state, "packing_format_for_cpu", False) for each in layers)
    trainer.step(examples, 2)
    deepest = [g for name, g in named_gradients(trainer.model) if ".layers.0.self_attn.q_proj" in name]
    assert deepest and all(float(gradient.norm()) > 0 for gradient in deepest)
    for number in range(3, 9):
        after = trainer.step(examples, number).loss
    assert after < before


def test_layers_that_are_computed_again_find_what_they_found(load_tiny: Load, tiny_config: Make) -> None:
    """XTuner's configs do just this: QLoRA in 16 bits with activations computed twice."""
    norms = []
    for twice in (False, True):
        loaded = load_tiny(bits=4, dtype=torch.bfloat16)
        settings = {"train.gradient_checkpointing": twice, "lora": {"rank": 4, "alpha": 8}}
        trainer = make_trainer(loaded, tiny_config(method="qlora", **settings), torch.bfloat16)
        norms.append(trainer.step(encode(loaded), 1).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def named_gradients(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_training_mode_and_frozen_weights_are_as_the_method_says(
    load_tiny: Load, tiny_config: Make, method: str
) -> None:
    loaded = load_tiny(bits=4 if method == "qlora" else 0)
    trainer = make_trainer(loaded, tiny_config(method=method))
    learning = [name for name, each in trainer.model.named_parameters() if each.requires_grad]
    assert trainer.model.training
    assert learning and all(("lora_" in name) == (method != "full") for name in learning)


def test_loss_that_is_not_finite_stops_before_weights_change(load_tiny: Load, tiny_config: Make) -> None:
    loaded = load_tiny()
    trainer = make_trainer(loaded, tiny_config(method="full"))
    weight = loaded.model.get_output_embeddings().weight
    others = {name: each.clone() for name, each in loaded.model.named_parameters() if each is not weight}
    with torch.no_grad():
        weight[5, 0] = math.nan
    with pytest.raises(NotFiniteError, match="step 3.*learning_rate"):
        trainer.step(encode(loaded), 3)
    assert all(torch.equal(each, others[name]) for name, each in loaded.model.named_parameters() if name in others)


def test_a_scale_that_is_too_large_is_halved_and_a_gradient_that_stays_infinite_is_told(
    load_tiny: Load, tiny_config: Make
) -> None:
    """In float16 the scaler skips a step by itself; it must not skip them all in silence."""
    loaded = load_tiny()
    trainer = make_trainer(loaded, tiny_config(method="full"), torch.float16)
    first = next(each for each in trainer.model.parameters() if each.requires_grad)
    first.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    examples = encode(loaded)
    before, scale = first.clone(), trainer.scaler.get_scale()
    for number in range(1, int(math.log2(scale)) + 1):
        assert trainer.step(examples[:2], number).grad_norm == math.inf
    assert trainer.scaler.get_scale() == 1 and torch.equal(first, before)
    with pytest.raises(NotFiniteError, match="gradient norm"):
        trainer.step(examples[:2], 99)


def test_half_precision_learns_what_float32_learns(load_tiny: Load, tiny_config: Make) -> None:
    """The loss is scaled for the pass and the gradient back again."""
    config = tiny_config(method="full")
    half, whole = (make_trainer(load_tiny(), config, dtype) for dtype in (torch.float16, torch.float32))
    assert half.scaler.get_scale() > 1
    examples = encode(load_tiny())
    for number in (1, 2):
        found, expected = half.step(examples, number), whole.step(examples, number)
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.02)


def test_gradients_are_clipped_and_reported_unclipped(load_tiny: Load, tiny_config: Make) -> None:
    loaded = load_tiny()
    free = make_trainer(load_tiny(), tiny_config(method="full", **{"train.max_grad_norm": 0.0}))
    tight = make_trainer(loaded, tiny_config(method="full", **{"train.max_grad_norm": 0.01}))
    norm = free.step(encode(loaded), 1).grad_norm
    assert tight.step(encode(loaded), 1).grad_norm == pytest.approx(norm, rel=1e-5)
    assert torch.stack([g.norm() for g in gradients(tight.model)]).norm() == pytest.approx(0.01, rel=1e-3)


def test_evaluation_is_the_mean_over_trained_tokens_and_leaves_no_trace(load_tiny: Load, tiny_config: Make) -> None:
    loaded = load_tiny()
    trainer = make_trainer(loaded, tiny_config(**{"lora.dropout": 0.5}))
    examples = encode(loaded)
    random_state = torch.get_rng_state()
    losses = {trainer.evaluate(examples) for _ in range(2)}
    assert torch.equal(random_state, torch.get_rng_state()) and trainer.model.training
    trainer.model.eval()
    expected, _ = reference(loaded, trainer.model, examples)
    assert len(losses) == 1 and losses.pop() == pytest.approx(expected, rel=1e-5)
    assert math.isnan(trainer.evaluate([]))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    train = TrainSection(learning_rate=1.0, warmup_steps=4, num_steps=20, schedule=schedule)
    rates = [learning_rate(train, step, 20, 4) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert all(one >= other for one, other in zip(rates[4:], rates[5:], strict=False))
    assert (0 < rates[-1] < 0.1) == (schedule != "constant")
    assert learning_rate(train, 13, 20, 4) == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule])


def test_warmup_never_eats_a_short_run() -> None:
    """Counted in epochs a run may be shorter than its warm-up; it must still reach its learning rate."""
    train = TrainSection(warmup_steps=50, num_epochs=1.0)
    assert warmup_steps(train, 30) == 3
    assert max(learning_rate(train, step, 30, 3) for step in range(1, 31)) == train.learning_rate
    assert warmup_steps(train, 1) == 0 and learning_rate(train, 1, 1, 0) == train.learning_rate


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.15), ("linear", 0.15), ("constant", 1.0)])
def test_warm_up_and_end_as_shares(schedule: str, last: float) -> None:
    train = TrainSection(schedule=schedule, learning_rate=1.0, warmup_ratio=0.03, final_learning_rate_ratio=0.15)
    assert [warmup_steps(train, steps) for steps in (2, 33, 34, 1000)] == [0, 0, 1, 30]
    assert learning_rate(train, 31, 1000, 30) == 1.0
    assert learning_rate(train, 1000, 1000, 30) == pytest.approx(last, abs=2e-3)


def test_paged_optimizer_needs_a_gpu(load_tiny: Load, tiny_config: Make) -> None:
    with pytest.raises(ConfigError, match="paged_adamw_8bit.*adamw"):
        make_trainer(load_tiny(), tiny_config(**{"train.optimizer": "paged_adamw_8bit"}))


def test_eight_bit_optimizer_learns(load_tiny: Load, tiny_config: Make) -> None:
    loaded = load_tiny()
    trainer = make_trainer(loaded, tiny_config(method="full", **{"train.optimizer": "adamw_8bit"}))
    losses = [trainer.step(encode(loaded), number).loss for number in range(1, 6)]
    assert losses[-1] < losses[0]
