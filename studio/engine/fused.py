"""Layers of a frozen base with a LoRA adapter as single autograd nodes: less to compute, less to keep.

The adapter's float32 weights are cast to the arithmetic's number format inside a node, its gradient comes out in
float32, and nothing is kept that the backward pass can do without. Layers that have more to them (dropout, DoRA,
weights of a norm that learn) stay as PEFT and transformers compute them. Works for whatever has PEFT's LoRA layers.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

PROBE_TOKENS = 3


def fuse(model: nn.Module) -> int:
    """Replace the forward passes that can be; returns how many LoRA layers were not.

    A norm is replaced only where both ways give the same on random numbers.
    """
    left = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                module.forward = MethodType(_lora_forward, module)
            else:
                left += 1
        elif _is_frozen_rms_norm(module) and _agree(module, _norm_forward):
            module.forward = MethodType(_norm_forward, module)
    return left


def unfuse(model: nn.Module) -> None:
    """Give every layer its own forward pass back."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_lora_forward, _norm_forward):
            del module.forward


def _is_plain(layer: LoraLayer) -> bool:
    """y = xW + s·xAB and nothing else."""
    names = list(layer.lora_A)
    base = layer.get_base_layer()
    return (
        len(names) == 1
        and names[0] not in getattr(layer, "lora_variant", {})
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and layer.lora_B[names[0]].bias is None
        and not getattr(layer, "fan_in_fan_out", False)
        and (type(layer) is LoraLinear and type(base) is nn.Linear or hasattr(base, "compute_dtype"))
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    [name] = list(layer.lora_A)
    if layer.disable_adapters or layer.merged or args or kwargs or layer.active_adapters != [name]:
        return type(layer).forward(layer, x, *args, **kwargs)
    lora = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return _LoraLinear.apply(x, layer.get_base_layer(), *lora)


def weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a linear layer as numbers of that format; 4-bit ones are unpacked for the moment."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit  # costs seconds, and only qlora needs it

    return dequantize_4bit(base.weight, state).to(dtype)


class _LoraLinear(torch.autograd.Function):
    """(…, in) to (…, out). Keeps its input and the adapter's narrow product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        flat, narrow_weights = x.reshape(-1, x.shape[-1]), (down.to(x.dtype), up.to(x.dtype))
        weight = weight_of(base, x.dtype)
        narrow = flat @ narrow_weights[0].t()
        out = flat @ weight.t() if base.bias is None else torch.addmm(base.bias.to(x.dtype), flat, weight.t())
        out.addmm_(narrow, narrow_weights[1].t(), alpha=scaling)
        ctx.save_for_backward(flat, narrow, *narrow_weights)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, narrow, down, up = ctx.saved_tensors
        wide = gradient.reshape(-1, gradient.shape[-1])
        d_narrow = (wide @ up).mul_(ctx.scaling)
        d_up = (narrow.t() @ wide).t().float().mul_(ctx.scaling)
        d_down = (flat.t() @ d_narrow).t().float()
        if not ctx.needs_input_grad[0]:  # nothing that learns lies below
            return None, None, d_down, d_up, None
        d_flat = wide @ weight_of(ctx.base, wide.dtype)
        return d_flat.addmm_(d_narrow, down).view(ctx.shape), None, d_down, d_up, None


def _is_frozen_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, Tensor)
        and weight.ndim == 1
        and not weight.requires_grad
    )


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis, in float32 inside. Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide, shape = (gradient * weight).float(), x.float() * scale
        along = torch.linalg.vecdot(wide, shape).unsqueeze(-1).div_(x.shape[-1])
        return wide.addcmul_(shape, along, value=-1).mul_(scale).to(gradient.dtype), None, None


@torch.no_grad()
def _agree(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether a forward pass gives what the module's own gives, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_TOKENS, module.weight.shape[0], generator=generator).to(module.weight)
    return torch.allclose(forward(module, x).float(), module(x).float(), rtol=0.02, atol=1e-3)
