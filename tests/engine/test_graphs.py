"""Passes that are recorded and replayed: the arithmetic over tensors that stay where they are, on a CPU.

Only recording itself needs a GPU. Here what is recorded is done again, on the same tensors.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from studio.config.schema import RunConfig
from studio.data.packing import few_rooms, filler, grow_tree
from studio.data.tokens import Example
from studio.engine import attention
from studio.engine.adapters import trainable_parameters
from studio.engine.attention import make_layout
from studio.engine.batches import Batch, join
from studio.engine.cuda import graphs, measured
from studio.engine.cuda.graphs import Replays
from studio.engine.loop import Trainer
from studio.engine.models.load import LoadedModel
from studio.errors import ConfigError
from tests.engine.test_attention import flex_in_plain_words, varlen_in_plain_words
from tests.engine.test_loop import encode, make_trainer

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]
CPU = torch.device("cpu")


class Again:
    """Records what to do, not what came out; counts both."""

    def __init__(self) -> None:
        self.num_run = self.num_recorded = self.num_replayed = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        self.num_run += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1

        def replay() -> Tensor:
            self.num_replayed += 1
            return work()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Again:
    """A CPU that records, and on which a replay takes half the time."""
    made = Again()
    monkeypatch.setattr(graphs, "recorder_of", lambda device: made)
    clock(monkeypatch, ordinary=2.0, replayed=1.0)
    return made


def clock(monkeypatch: pytest.MonkeyPatch, ordinary: float, replayed: float) -> None:
    times = itertools.cycle([ordinary, replayed])
    monkeypatch.setattr(measured, "seconds", lambda way, device: next(times))


def trained(loaded: LoadedModel, config: RunConfig, num_steps: int) -> tuple[Trainer, list[float], list[Tensor]]:
    """Losses, and the weights after steps on other rows each time."""
    trainer = make_trainer(loaded, config)
    rows = encode(loaded, 24)
    losses = [trainer.step(rows[4 * (step % 6) :][:4], step + 1).loss for step in range(num_steps)]
    return trainer, losses, [each.detach().clone() for each in trainable_parameters(trainer.model)]


@pytest.mark.parametrize("kind", ["sdpa", "varlen", "flex"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_replays_is_the_run_that_does_not(
    load_tiny: Load, tiny_config: Make, recorder: Again, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    settings = {"model.attention": "sdpa", "data.pack": "tree", "train.micro_batch_size": 2}
    monkeypatch.setattr(attention, "_varlen", varlen_in_plain_words)
    monkeypatch.setattr("studio.engine.cuda.flex._compiled", lambda: flex_in_plain_words)
    _, expected_losses, expected = trained(load_tiny(), tiny_config(method=method, **settings), 8)
    assert recorder.num_run == 0
    settings |= {"model.attention": kind, "train.cuda_graph": "auto"}
    trainer, losses, found = trained(load_tiny(), tiny_config(method=method, **settings), 8)
    assert trainer.forward.kind == kind
    assert recorder.num_recorded >= 1 and recorder.num_replayed > 4
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * max(1.0, float(other.norm()))


def test_rows_of_a_fixed_size_have_tensors_of_few_shapes() -> None:
    """And everything but what the weights say is as without the filler."""
    shapes = set()
    for length in range(200, 250, 7):
        example = Example(list(range(length)), list(range(length)))
        trees = [grow_tree([example]), grow_tree([example])]
        for kind in ("sdpa", "varlen", "flex"):
            layout = partial(make_layout, kind, device=CPU, fixed=True)
            batch, plain = join([*trees, filler(trees, few_rooms)], layout), join(trees, layout)
            shapes.add((kind, *(tensor.shape for tensor in batch.tensors)))
            assert batch.num_trained_tokens == plain.num_trained_tokens and batch.num_tokens == plain.num_tokens
            num_edges = len(plain.targets)
            assert batch.targets[:num_edges].equal(plain.targets) and not batch.weights[num_edges:].any()
            assert (batch.places[num_edges:] == plain.input_ids.numel()).all()
    assert len(shapes) <= 6


def simple(batch: Batch, weight: torch.nn.Parameter) -> Tensor:
    """A pass in one line: its gradient is the weighted sum of the tokens."""
    loss = (batch.input_ids[0, batch.places].float() * batch.weights).sum() * weight
    loss.backward()
    return loss.detach().clone()


def batch_of(*ids: int) -> Batch:
    tree = grow_tree([Example(list(ids), list(ids))])
    return join([tree, filler([tree], few_rooms)], partial(make_layout, "sdpa", device=CPU, fixed=True))


def make_replays(compute: Callable[[Batch, torch.nn.Parameter], Tensor], recorder: Again, must: bool = False) -> tuple:
    weight = torch.nn.Parameter(torch.ones(()))
    made = Replays(lambda batch: compute(batch, weight), [weight], recorder, CPU, must)
    return made, weight


def test_replays_add_to_the_gradient_and_forget_when_it_is_another(recorder: Again) -> None:
    replays, weight = make_replays(simple, recorder)
    for step in range(6):
        for first in (3, 5):
            before = 0.0 if weight.grad is None else float(weight.grad)
            assert float(replays(batch_of(first, 7, 9))) == first + 7
            assert float(weight.grad) == before + first + 7
        if step == 3:
            assert recorder.num_recorded == 1 and recorder.num_replayed > 2
            weight.grad = None  # as after a step for which memory ran out
    assert recorder.num_recorded == 2


def test_a_replay_with_another_gradient_is_not_used(recorder: Again, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a pass that depends on something which a recording does not see."""
    calls = itertools.count()

    def drifting(batch: Batch, weight: torch.nn.Parameter) -> Tensor:
        return simple(replace(batch, weights=batch.weights * (1 + next(calls))), weight)

    replays, weight = make_replays(drifting, recorder)
    for _ in range(5):
        replays(batch_of(3, 7, 9))
    assert "not used, the gradient differs by" in capsys.readouterr().out and recorder.num_replayed == 1
    with pytest.raises(ConfigError, match="train.cuda_graph"):
        replays, weight = make_replays(drifting, recorder, must=True)
        for _ in range(5):
            replays(batch_of(3, 7, 9))


def test_a_trial_leaves_nothing_in_the_gradient(
    recorder: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock(monkeypatch, ordinary=1.0, replayed=1.0)
    replays, weight = make_replays(simple, recorder)
    for count in range(1, 6):
        replays(batch_of(3, 7, 9))
        assert float(weight.grad) == 10 * count
    assert recorder.num_replayed == 1 and "not faster" in capsys.readouterr().out


def test_rows_are_no_longer_filled_once_replaying_is_given_up(
    load_tiny: Load, tiny_config: Make, recorder: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, ordinary=1.0, replayed=1.0)
    settings = {"model.attention": "sdpa", "train.cuda_graph": "auto", "train.micro_batch_size": 2}
    trainer = make_trainer(load_tiny(), tiny_config(**settings))
    rows = encode(load_tiny(), 4)
    widths = []
    for step in range(1, 7):
        widths.append([batch.input_ids.numel() for batch in trainer.forward.batches(rows, 2)])
        trainer.step(rows, step)
    assert all(width % 64 == 0 for width in widths[0]) and sum(widths[-1]) < sum(widths[0])


def test_what_cannot_be_recorded_is_computed_as_ever(
    recorder: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(work: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", refuse)
    replays, weight = make_replays(simple, recorder)
    assert [float(replays(batch_of(3, 7, 9))) for _ in range(5)] == [10.0] * 5
    assert float(weight.grad) == 50 and "stream is capturing" in capsys.readouterr().out


def test_only_so_many_sizes_are_recorded(recorder: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_RECORDED", 1)
    replays, weight = make_replays(simple, recorder)
    for _ in range(4):
        replays(batch_of(3, 7, 9))
        replays(batch_of(*range(100)))
    assert recorder.num_recorded == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "needs an NVIDIA GPU"),
        ({"train.gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"train.offload_activations": True}, "offload_activations"),
        ({"lora.dropout": 0.1}, "dropout"),
        ({"distributed.strategy": "deepspeed"}, "DeepSpeed"),
        ({"model.attention": "blocks"}, "attention blocks"),
    ],
    ids=lambda value: str(value),
)
def test_on_refuses_where_it_cannot_and_auto_says_why(
    load_tiny: Load,
    tiny_config: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict,
    why: str,
) -> None:
    if settings:
        monkeypatch.setattr(graphs, "recorder_of", lambda device: Again())
    with pytest.raises(ConfigError, match=f"train.cuda_graph: is on, but .*{why}"):
        make_trainer(load_tiny(), tiny_config(**settings, **{"train.cuda_graph": "on"}))
    trainer = make_trainer(load_tiny(), tiny_config(**settings, **{"train.cuda_graph": "auto"}))
    assert not trainer.forward.keeps_gradients
    assert "CUDA graph: not used, " in (said := capsys.readouterr().out) and why in said
