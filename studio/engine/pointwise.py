"""What stands between the products of a layer, number by number: as PyTorch computes it, or compiled into one pass.

Compiled, each is a single loop over memory (torch.compile with Inductor: C++ on a CPU, Triton on a GPU), which takes
half a minute the first time and is remembered by PyTorch after that.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn import functional


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis, in float32 inside; and one over that root."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale.add_(epsilon).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale


def norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of `norm` at x."""
    wide, wide_x = (gradient * weight).float(), x.float()
    along = torch.linalg.vecdot(wide, wide_x).unsqueeze(-1).mul_(scale.square()).div_(x.shape[-1])
    return wide.addcmul_(wide_x, along, value=-1).mul_(scale).to(gradient.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return functional.silu(gate).mul_(up)


def gated_gradient(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gated` at both."""
    d_up = functional.silu(gate).mul_(gradient)
    return torch.ops.aten.silu_backward(gradient * up, gate), d_up


@dataclass(frozen=True)
class Pointwise:
    """The functions that layers call."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = norm
    norm_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = norm_gradient
    gated: Callable[[Tensor, Tensor], Tensor] = gated
    gated_gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = gated_gradient


now = Pointwise()


def use(compiled: bool, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> str:
    """Let layers call the compiled functions, or the plain ones; why it is the plain ones when it cannot be, else "".

    The number of tokens changes with every step, so the compiled loops are for any.
    """
    global now
    now, why = Pointwise(), ""
    if compiled:
        try:
            found = Pointwise(*(torch.compile(each, dynamic=True) for each in astuple(now)))
            _try(found, dtype, device)
            now = found
        except Exception as error:  # a compiler that is missing or fails, in whatever way
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return why


@torch.no_grad()
def _try(functions: Pointwise, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises what compiling raises."""
    for num_tokens in (5, 7):
        states = torch.ones(num_tokens, 64, dtype=dtype, device=device)
        narrow = states[0]
        _, scale = functions.norm(states, narrow, 1e-5)
        functions.norm_gradient(states, states, narrow, scale)
        functions.gated_gradient(states, functions.gated(states, states), states)
