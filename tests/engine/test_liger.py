"""Kernels of another library: only where it is installed, only what is right and faster, and gone without a trace."""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama import modeling_llama

from studio.config.schema import RunConfig
from studio.engine.cuda import liger, measured
from studio.engine.cuda.liger import Kernels
from studio.engine.models.load import LoadedModel
from tests.engine.test_loop import encode, make_trainer, step_gradients

Load = Callable[..., LoadedModel]
Make = Callable[..., RunConfig]
OWN_ROTARY = modeling_llama.apply_rotary_pos_emb


class TurnedInPlace(torch.autograd.Function):
    """As Liger's: it writes where query and key stand, and gets the gradient by turning back in place, too."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        for each, turned in zip((query, key), OWN_ROTARY(query, key, cos, sin), strict=True):
            each.data.copy_(turned)
        return query.transpose(1, 2).transpose(1, 2), key.transpose(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *OWN_ROTARY(*(each.contiguous() for each in gradients), cos, -sin), None, None


def norm(x: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str, in_place: bool) -> Tensor:
    assert (offset, casting, in_place) == (0.0, "llama", False)
    return functional.rms_norm(x, x.shape[-1:], weight, epsilon)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: None, axis: int) -> tuple[Tensor, Tensor]:
    assert axis == 1
    return TurnedInPlace.apply(query, key, cos, sin)


GOOD = Kernels(norm, gated, rotary)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A CPU that passes for a GPU with these kernels, which take twice the time or (by default) half of it."""
    monkeypatch.setattr(liger, "runs_on", lambda device: True)
    monkeypatch.setattr(measured, "_key", lambda device: "a card")

    def have(kernels: Kernels, liger_seconds: float = 0.5) -> None:
        times = itertools.cycle([1.0, liger_seconds])
        monkeypatch.setattr(liger, "installed", lambda: kernels)
        monkeypatch.setattr(measured, "seconds", lambda way, device: next(times))

    yield have
    liger.release()


def used(model: torch.nn.Module) -> set[str]:
    """Names of what is computed by kernels."""
    layers = {type(each).__name__ for each in model.modules() if "_layers.<locals>" in str(vars(each).get("forward"))}
    return layers | ({"rotary"} if modeling_llama.apply_rotary_pos_emb is not OWN_ROTARY else set())


@pytest.mark.parametrize(
    ("method", "expected"), [("lora", {"rotary"}), ("full", {"rotary", "LlamaRMSNorm", "LlamaMLP"})]
)
def test_kernels_stand_where_nothing_is_fused_and_the_gradient_is_the_same(
    load_tiny: Load, tiny_config: Make, gpu: Callable[..., None], method: str, expected: set[str]
) -> None:
    settings = {"method": method, "train.learning_rate": 1e-30, "train.max_grad_norm": 0.0}
    gpu(GOOD)
    plain = make_trainer(load_tiny(), tiny_config(**settings, **{"train.liger": "off"}))
    assert used(plain.model) == set()
    own_loss, own = step_gradients(plain, encode(load_tiny()))
    trainer = make_trainer(load_tiny(), tiny_config(**settings))
    assert used(trainer.model) == expected
    loss, found = step_gradients(trainer, encode(load_tiny()))
    assert loss == pytest.approx(own_loss, rel=1e-5)
    for one, other in zip(found, own, strict=True):
        assert (one - other).norm() <= 1e-5 * max(float(other.norm()), 1e-2)
    liger.release()
    assert used(trainer.model) == set()


def test_without_the_package_our_own_code_computes_and_the_log_says_so(
    load_tiny: Load,
    tiny_config: Make,
    gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError):
        liger.installed()
    trainer = make_trainer(load_tiny(), tiny_config(method="full"))
    assert used(trainer.model) == set()
    assert "Liger kernels: not used, liger-kernel is not installed: computed by our own" in capsys.readouterr().out


def test_what_is_slower_wrong_or_broken_is_left_alone(
    load_tiny: Load, tiny_config: Make, gpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    gpu(Kernels(norm, lambda gate, up: functional.gelu(gate) * up, broken), liger_seconds=2.0)
    trainer = make_trainer(load_tiny(), tiny_config(method="full"))
    assert used(trainer.model) == set()
    said = capsys.readouterr().out
    assert "RMSNorm 64 wide: own (measured on this GPU: own 1e+03 ms, Liger 2e+03 ms)" in said
    assert "gated MLP 64 wide: own code, Liger's result differs by" in said
    assert "for keys, 16 wide: own code, Liger's failed (no kernel image is available)" in said


def test_on_a_cpu_nothing_is_looked_for(
    load_tiny: Load, tiny_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(liger, "installed", lambda: pytest.fail("looked for"))
    make_trainer(load_tiny(), tiny_config(method="full"))
    assert "Liger" not in capsys.readouterr().out
