"""What stands between products: equal to autograd's, and compiled equal to plain."""

import shutil
from collections.abc import Iterator
from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from studio.engine import pointwise
from studio.engine.pointwise import Pointwise


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    yield
    pointwise.use(compiled=False)


def results(functions: Pointwise, num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x, gradient, gate, up = torch.randn(4, num_tokens, 24, generator=generator).unbind()
    out, scale = functions.norm(x, gate[0], 1e-5)
    gradients = functions.gated_gradient(gradient, gate, up)
    return [out, functions.norm_gradient(gradient, x, gate[0], scale), functions.gated(gate, up), *gradients]


def test_gradients_are_those_of_autograd() -> None:
    x, gradient, gate, up = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(7)).unbind()
    for each in (x, gate, up):
        each.requires_grad_()
    normed = functional.rms_norm(x, (24,), gate[0].detach(), 1e-5)
    through = functional.silu(gate) * up
    expected = [
        normed, *torch.autograd.grad(normed, x, gradient), through, *torch.autograd.grad(through, (gate, up), gradient)
    ]  # fmt: skip
    with torch.no_grad():
        found = results(Pointwise(), 7)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_functions_compute_the_same_for_any_number_of_tokens() -> None:
    assert pointwise.use(compiled=True) == ""
    assert all(one is not other for one, other in zip(astuple(pointwise.now), astuple(Pointwise()), strict=True))
    with torch.no_grad():
        for num_tokens in (7, 12):
            found, expected = results(pointwise.now, num_tokens), results(Pointwise(), num_tokens)
            assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_without_a_compiler_it_goes_on_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler was found\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    assert pointwise.use(compiled=True) == "no C++ compiler was found"
    assert pointwise.now == Pointwise()
