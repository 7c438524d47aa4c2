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
from transformers.activations import SiLUActivation

from studio.engine import pointwise

PROBE_TOKENS = 3
# oneDNN (torch 2.13) leaves a product whose result is narrower than what is summed to one of two threads when it has
# more rows than that.
SHARED_ROWS = 512
FEW_THREADS = 4


def fuse(model: nn.Module) -> int:
    """Replace the forward passes that can be; returns how many LoRA layers were not.

    A norm or a gated MLP is replaced only where both ways give the same on random numbers.
    """
    left = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                module.forward = MethodType(_lora_forward, module)
            else:
                left += 1
        elif is_rms_norm(module) and not module.weight.requires_grad and _agree(module, _norm_forward, module.weight):
            module.forward = MethodType(_norm_forward, module)
    for module in model.modules():
        if _is_gated_mlp(module) and _agree(module, _mlp_forward, module.gate_proj.lora_A[_name(module)].weight):
            module.forward = MethodType(_mlp_forward, module)
    return left


def unfuse(model: nn.Module) -> None:
    """Give every layer its own forward pass back."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in FORWARDS:
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
    if args or kwargs or not _is_on(layer):
        return type(layer).forward(layer, x, *args, **kwargs)
    [name] = list(layer.lora_A)
    lora = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return _LoraLinear.apply(x, layer.get_base_layer(), *lora)


def _is_on(layer: Any) -> bool:
    """Whether the layer's only adapter is what counts now."""
    return not (layer.disable_adapters or layer.merged) and layer.active_adapters == list(layer.lora_A)


def weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a linear layer as numbers of that format; 4-bit ones are unpacked for the moment."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit  # costs seconds, and only qlora needs it

    return dequantize_4bit(base.weight, state).to(dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight."""
    return _add_product(x.new_empty(len(x), weight.shape[1]), x, weight, beta=0)


def _add_product(total: Tensor, x: Tensor, weight: Tensor, beta: int = 1) -> Tensor:
    """Add x @ weight to `total`, in pieces that are shared among few threads."""
    is_narrower = x.device.type == "cpu" and weight.shape[1] < weight.shape[0]
    pieces = is_narrower and 1 < torch.get_num_threads() <= FEW_THREADS
    size = SHARED_ROWS if pieces else len(x)
    for start in range(0, len(x), size):
        total[start : start + size].addmm_(x[start : start + size], weight, beta=beta)
    return total


class _LoraLinear(torch.autograd.Function):
    """(…, in) to (…, out). Keeps its input and the adapter's narrow product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        flat, narrow_weights = x.reshape(-1, x.shape[-1]), (down.to(x.dtype), up.to(x.dtype))
        weight = weight_of(base, x.dtype)
        narrow = flat @ narrow_weights[0].t()
        out = _product(flat, weight.t())
        if base.bias is not None:
            out += base.bias.to(x.dtype)
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
        d_flat = _product(wide, weight_of(ctx.base, wide.dtype))
        return d_flat.addmm_(d_narrow, down).view(ctx.shape), None, d_down, d_up, None


def _is_gated_mlp(module: nn.Module) -> bool:
    """down(silu(gate(x)) · up(x)) of three fused layers without biases."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        all(isinstance(layer, LoraLayer) and _is_plain(layer) for layer in layers)
        and all(layer.get_base_layer().bias is None for layer in layers)
        and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    )


def _name(mlp: Any) -> str:
    return next(iter(mlp.gate_proj.lora_A))


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(_is_on(layer) for layer in layers):
        return type(mlp).forward(mlp, x)
    name = _name(mlp)
    weights = (side[name].weight for layer in layers for side in (layer.lora_A, layer.lora_B))
    bases, scalings = [layer.get_base_layer() for layer in layers], [layer.scaling[name] for layer in layers]
    return _GatedMlp.apply(x, bases, scalings, *weights)


class _GatedMlp(torch.autograd.Function):
    """(…, in) to (…, out). What the gate lets through is formed again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bases: list[nn.Module], scalings: list[float], *lora: Tensor) -> Tensor:
        """`lora`: down and up weights of gate, up and down layer."""
        flat, narrow_weights = x.reshape(-1, x.shape[-1]), [each.to(x.dtype) for each in lora]
        gate_a, gate_b, up_a, up_b, down_a, down_b = narrow_weights
        narrow = flat @ torch.cat([gate_a, up_a]).t()
        of_gate, of_up = narrow.split([len(gate_a), len(up_a)], 1)
        gate = _product(flat, weight_of(bases[0], x.dtype).t()).addmm_(of_gate, gate_b.t(), alpha=scalings[0])
        up = _product(flat, weight_of(bases[1], x.dtype).t()).addmm_(of_up, up_b.t(), alpha=scalings[1])
        through = pointwise.now.gated(gate, up)
        of_down = through @ down_a.t()
        out = _product(through, weight_of(bases[2], x.dtype).t()).addmm_(of_down, down_b.t(), alpha=scalings[2])
        ctx.save_for_backward(flat, gate, up, through, narrow, of_down, *narrow_weights)
        ctx.bases, ctx.scalings, ctx.shape = bases, scalings, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, gate, up, through, narrow, of_down, *narrow_weights = ctx.saved_tensors
        gate_a, gate_b, up_a, up_b, down_a, down_b = narrow_weights
        wide = gradient.reshape(-1, gradient.shape[-1])
        d_of_down = (wide @ down_b).mul_(ctx.scalings[2])
        d_through = _product(wide, weight_of(ctx.bases[2], wide.dtype)).addmm_(d_of_down, down_a)
        d_down = ((through.t() @ d_of_down).t().float(), (of_down.t() @ wide).t().float().mul_(ctx.scalings[2]))
        d_gate, d_up = pointwise.now.gated_gradient(d_through, gate, up)
        d_narrow = torch.cat([(d_gate @ gate_b).mul_(ctx.scalings[0]), (d_up @ up_b).mul_(ctx.scalings[1])], 1)
        of_gate, of_up = narrow.split([len(gate_a), len(up_a)], 1)
        d_gate_b = (of_gate.t() @ d_gate).t().float().mul_(ctx.scalings[0])
        d_up_b = (of_up.t() @ d_up).t().float().mul_(ctx.scalings[1])
        d_gate_a, d_up_a = (flat.t() @ d_narrow).t().float().split([len(gate_a), len(up_a)])
        d_lora = (d_gate_a, d_gate_b, d_up_a, d_up_b, *d_down)
        if not ctx.needs_input_grad[0]:  # nothing that learns lies below
            return None, None, None, *d_lora
        d_flat = _product(d_gate, weight_of(ctx.bases[0], wide.dtype))
        _add_product(d_flat, d_up, weight_of(ctx.bases[1], wide.dtype)).addmm_(d_narrow, torch.cat([gate_a, up_a]))
        return d_flat.view(ctx.shape), None, None, *d_lora


def is_rms_norm(module: nn.Module) -> bool:
    """Whether transformers computes it as Llama's: x / sqrt(mean(x²) + epsilon) · weight."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, Tensor)
        and weight.ndim == 1
    )


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = pointwise.now.norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        return pointwise.now.norm_gradient(gradient, x, weight, scale), None, None


@torch.no_grad()
def _agree(module: nn.Module, forward: Callable[..., Tensor], like: Tensor) -> bool:
    """Whether a forward pass gives what the module's own gives, but for rounding. `like`: (…, width) of its inputs."""
    x = torch.randn(PROBE_TOKENS, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
    found, expected = forward(module, x).float(), module(x).float()
    return bool((found - expected).norm() <= 0.02 * expected.norm())


FORWARDS = (_lora_forward, _mlp_forward, _norm_forward)
