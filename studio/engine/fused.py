"""Layers of a frozen base with a LoRA adapter as single autograd nodes: less to compute, less to keep, fewer calls.

A decoder layer as most models have it becomes two nodes, before its attention and after it, or one with its attention
where all is compiled (cpu/kernels.cpp). Where a layer differs, its norms, its gated MLP and its LoRA layers become
nodes one by one; what has more to it (dropout, DoRA, weights of a norm that learn) stays as PEFT and transformers
compute it. Works for whatever has PEFT's LoRA layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from studio.engine import attention
from studio.engine.cpu import compiled
from studio.engine.parts import GatedMlp, Heads, Linears, Norm, Part, Rest

PROBE_TOKENS = 3
FAINT = 0.02  # a layer adds to its input; beside a faint one that can be told, as its norm makes it as strong as any
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def fuse(model: nn.Module) -> int:
    """Replace the forward passes that can be; returns how many LoRA layers were not.

    All but LoRA layers are replaced only where both ways give the same of random numbers.
    """
    left = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                module.forward = FusedPart(module, [module], Linears([module], joined=False)).forward
            else:
                left += 1
        elif is_rms_norm(module) and not module.weight.requires_grad:
            _replace(module, FusedPart(module, [], Norm(module)), _random(module.weight))
    for module in model.modules():
        if _is_gated_mlp(module):
            layers = [module.gate_proj, module.up_proj, module.down_proj]
            _replace(module, FusedPart(module, layers, GatedMlp(*layers)), _random(_learning(layers[0])))
    for module in model.modules():
        if _is_decoder_layer(module):
            x = _random(module.input_layernorm.weight) * FAINT
            with _seen_through(module.self_attn.config):
                _replace(module, FusedLayer(module), x, x, position_embeddings=_angles(module))
    return left


def unfuse(model: nn.Module) -> None:
    """Give every layer its own forward pass back."""
    for module in model.modules():
        if _fused(module):
            del module.forward


def keep_order(model: nn.Module) -> None:
    """Every layer is the same two nodes from here on, whatever its row: what learns gets its gradient in one order.

    Processes that exchange gradients as they come, as DeepSpeed's do, would mix them up otherwise.
    """
    for module in model.modules():
        if isinstance(own := _fused(module), FusedLayer):
            own.may_be_one = False


class _Node(torch.autograd.Function):
    """A part with the first `num_inputs` of the tensors as its inputs, all (…, width); the others are what learns."""

    @staticmethod
    def forward(ctx: Any, part: Part, num_inputs: int, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.part, ctx.shape = part, tensors[0].shape
        inputs = (each.reshape(-1, each.shape[-1]) for each in tensors[:num_inputs])
        out, kept = part.forward(*inputs, tensors[num_inputs:])
        ctx.save_for_backward(*kept)
        if isinstance(out, Tensor):
            return out.view(*ctx.shape[:-1], -1)
        return tuple(each.view(*ctx.shape[:-1], *each.shape[1:]) for each in out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        num_axes = len(ctx.shape) - 1
        flat = (each.flatten(0, num_axes - 1) for each in gradients)
        d_inputs, d_lora = ctx.part.backward(*flat, ctx.saved_tensors, ctx.needs_input_grad[2])
        shaped = (each if each is None else each.view(*ctx.shape[:-1], -1) for each in d_inputs)
        return None, None, *shaped, *d_lora


class FusedPart:
    """A module that is one part. `layers`: its LoRA layers, whose adapters have to be in use."""

    def __init__(self, module: nn.Module, layers: list[Any], part: Part) -> None:
        self._module, self._layers, self.part = module, layers, part

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not all(_is_on(layer) for layer in self._layers):
            return type(self._module).forward(self._module, x, *args, **kwargs)
        return _Node.apply(self.part, 1, x, *self.part.lora)


class FusedLayer:
    """A decoder layer: a node, its attention by whichever kernel the model has, and another node."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [_fused(norm).part for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self._layer, self._attention = layer, attention
        self._heads = Heads(norms[0], attention)
        self._rest = Rest(attention.o_proj, norms[1], _fused(mlp).part)
        self._compiled, self.may_be_one = compiled.halves(self._heads, self._rest), True
        self._layers = [getattr(attention, name) for name in PROJECTIONS]
        self._layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or not self._takes(**kwargs):
            return type(self._layer).forward(self._layer, x, *args, **kwargs)
        if self._layer.gradient_checkpointing and self._layer.training:
            return self._layer._gradient_checkpointing_func(partial(self._compute, **kwargs), x)
        return self._compute(x, **kwargs)

    def _takes(
        self, past_key_values: Any = None, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> bool:
        """Not with a cache of keys and values, eager attention, nor where only a part of each head is turned."""
        return (
            past_key_values is None
            and self._attention.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
            and position_embeddings is not None
            and position_embeddings[0].shape[-1] == self._attention.head_dim
            and all(_is_on(layer) for layer in self._layers)
        )

    def _compute(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        **kwargs: Any,
    ) -> Tensor:
        first, second = self._halves(x)
        angles = [each.expand(*x.shape[:-1], -1) for each in position_embeddings]
        is_compiled = self._compiled is not None and first is self._compiled[0]
        if is_compiled and self.may_be_one and (whole := self._whole(x, **kwargs)):
            return _Node.apply(whole, 3, x, *angles, *whole.lora)
        heads = _Node.apply(first, 3, x, *angles, *first.lora)
        attended = self._attend(*(each.transpose(1, 2) for each in heads), attention_mask, **kwargs)
        return _Node.apply(second, 2, x, attended.flatten(2), *second.lora)

    def _whole(self, x: Tensor, **kwargs: Any) -> Part | None:
        """The compiled halves and the attention between them as one part, where that, too, is compiled."""
        own = self._attention
        dropout = own.attention_dropout if own.training else 0.0
        if own.config._attn_implementation != attention.NAME or attention.has_more(dropout, **kwargs):
            return None
        num_key_heads = self._heads.linears.widths[1] // own.head_dim
        row = attention.compiled_row(num_key_heads, own.scaling, x)
        return compiled.CompiledLayer(*self._compiled, *row) if row else None

    def _halves(self, x: Tensor) -> tuple[Part, Part]:
        """Compiled, where the numbers are what they were: a setting of DeepSpeed narrows what learns later on."""
        kinds = (x.dtype, self._heads.lora[0].dtype)
        if self._compiled and kinds == (self._heads.norm.weight.dtype, torch.float32) and compiled.takes(x):
            return self._compiled
        return self._heads, self._rest

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """What the layer's own attention calls."""
        own = self._attention
        kernel = ALL_ATTENTION_FUNCTIONS[own.config._attn_implementation]
        dropout = own.attention_dropout if own.training else 0.0
        window = getattr(own, "sliding_window", None)
        settings = {"dropout": dropout, "scaling": own.scaling, "sliding_window": window}
        return kernel(own, query, key, value, mask, **settings, **kwargs)[0]


def _fused(module: nn.Module) -> Any:
    """What replaced a module's forward pass; None where nothing did."""
    found = getattr(vars(module).get("forward"), "__self__", None)
    return found if isinstance(found, FusedPart | FusedLayer) else None


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


def _is_on(layer: Any) -> bool:
    """Whether the layer's only adapter is what counts now."""
    return not (layer.disable_adapters or layer.merged) and layer.active_adapters == list(layer.lora_A)


def _learning(layer: Any) -> Tensor:
    """A of a LoRA layer: (rank, in)."""
    return next(iter(layer.lora_A.values())).weight


def _are_alike(layers: list[Any]) -> bool:
    """Plain layers whose adapters are scaled by one number."""
    if not all(isinstance(layer, LoraLayer) and _is_plain(layer) for layer in layers):
        return False
    return len({scaling for layer in layers for scaling in layer.scaling.values()}) == 1


def gated_layers(module: nn.Module) -> list[Any]:
    """Gate, up and down of a module that is called as one with down(silu(gate(x)) · up(x)) is; none of another."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_gated = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    return layers if is_gated and None not in layers else []


def _is_gated_mlp(module: nn.Module) -> bool:
    return bool(layers := gated_layers(module)) and _are_alike(layers)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether transformers computes it as Llama's: x / sqrt(mean(x²) + epsilon) · weight."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(weight, Tensor)
        and weight.ndim == 1
    )


def _is_decoder_layer(module: nn.Module) -> bool:
    """Norm, attention, norm and MLP and nothing else, the norms and the MLP fused already."""
    attention = getattr(module, "self_attn", None)
    return (
        dict(module.named_children()).keys() == LAYER
        and all(_fused(getattr(module, name)) for name in LAYER - {"self_attn"})
        and dict(attention.named_children()).keys() == set(PROJECTIONS)
        and _are_alike([getattr(attention, name) for name in PROJECTIONS])
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "attention_dropout", "config"))
        and hasattr(module, "gradient_checkpointing")
    )


@torch.no_grad()
def _replace(
    module: nn.Module, fused: FusedPart | FusedLayer, x: Tensor, passed: Tensor | float = 0.0, **inputs: Any
) -> None:
    """Replace a module's forward pass if both give the same but for rounding. `passed`: what it adds its result to."""
    try:
        found, expected = fused.forward(x, **inputs), module(x, **inputs)
        difference, size = (found.float() - expected.float()).norm(), (expected.float() - passed).norm()
    except Exception:  # it takes something else, or gives something else, and fails in whatever way
        return
    if difference <= 0.02 * size:
        module.forward = fused.forward


def _random(like: Tensor) -> Tensor:
    """Numbers (1, tokens, width) to try a module with that reads tensors (…, width) such as `like`."""
    shape = (1, PROBE_TOKENS, like.shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def _seen_through(config: Any) -> Iterator[None]:
    """Attention gives what it was given, so that all of it counts: of faint scores the softmax would hide the most."""
    before, config._attn_implementation = config._attn_implementation, SEEN_THROUGH
    try:
        yield
    finally:
        config._attn_implementation = before


def _sum(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    return (scaling * (query + 2 * key + 3 * value)).transpose(1, 2), None


SEEN_THROUGH = "retune-seen-through"
AttentionInterface.register(SEEN_THROUGH, _sum)


def _angles(layer: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, tokens, width of a head) for the tokens that a layer is tried with."""
    angles = torch.arange(PROBE_TOKENS)[:, None] / torch.arange(1, layer.self_attn.head_dim // 2 + 1)
    both = torch.cat([angles, angles], 1)[None].to(layer.input_layernorm.weight)
    return both.cos(), both.sin()
