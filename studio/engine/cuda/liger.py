"""Kernels of liger-kernel, where it is installed, for what is not one node here already: rotary positions and, in
layers that `fuse` leaves alone, RMSNorm and the gate of an MLP.

A kernel is taken only where output and gradients are those of the layer's own code, and only where it measures faster.
Of the others in the package none is wanted: the head is computed at trained positions only, a few at a time (head.py).

Liger-Kernel: https://linkedin.github.io/Liger-Kernel/Low-Level-APIs
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from studio.engine.attention import head_shape
from studio.engine.cuda import measured
from studio.engine.fused import gated_layers, is_rms_norm

TRIAL_TOKENS = 2048
TOLERANCE = 0.02  # of each result's length: sixteen-bit numbers rounded at other places differ by less
ROTARY = "apply_rotary_pos_emb"  # by this name transformers' attention layers call theirs
ROTARY_ARGUMENTS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
Outcome = list[Tensor]  # an output, and the gradients it has at all that can have one
Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Kernels:
    """As liger_kernel.transformers.functional has them."""

    norm: Callable[..., Tensor]  # (x, weight, epsilon, offset, casting, whether the gradient may be overwritten)
    gated: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cosine, sine, positions, axis of the heads)


@dataclass(frozen=True)
class Piece:
    """A part of a model that can be computed in two ways. `take` lets the model compute it by Liger from now on."""

    what: str
    own: Run
    liger: Run
    take: Callable[[], None]


_undo: list[Callable[[], None]] = []


def use(model: nn.Module, wanted: str, dtype: torch.dtype, device: torch.device) -> None:
    """Let a model on a GPU compute by Liger's kernels what they compute faster; says in the log which, and why.

    `wanted`: "auto", or "off" for none.
    """
    release()
    if not runs_on(device):
        return
    if wanted == "off":
        return _say("off, as configured")
    try:
        kernels = installed()
    except Exception as error:  # it is not there, or does not fit this torch or this GPU
        return _say(f"not used, {_reason(error)}: computed by our own and PyTorch's code")
    for piece in [*_layers(model, kernels), *_rotary(model, kernels, dtype, device)]:
        _say(f"{piece.what}: {_chosen(piece, f'{piece.what}, {dtype}', device)}")


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels do."""
    return device.type == "cuda"


def release() -> None:
    """Let everything be computed by its own code again."""
    while _undo:
        _undo.pop()()


def installed() -> Kernels:
    """Raises ImportError where liger-kernel is not installed."""
    from liger_kernel.transformers import functional  # an extra, which needs Triton

    return Kernels(functional.liger_rms_norm, functional.liger_swiglu, functional.liger_rope)


def _chosen(piece: Piece, what: str, device: torch.device) -> str:
    """Take the kernel where it is right and faster; what was done, in words."""
    try:
        difference = max(map(_difference, piece.liger(), piece.own()))
    except Exception as error:  # a kernel may fail in whatever way
        return f"own code, Liger's failed ({_reason(error)})"
    if not difference <= TOLERANCE:
        return f"own code, Liger's result differs by {difference:.1e}"
    choice = measured.fastest(what, {"own": piece.own, "Liger": piece.liger}, device)
    if choice.name == "Liger":
        piece.take()
    return f"{choice.name} ({choice.why})"


def _layers(model: nn.Module, kernels: Kernels) -> Iterator[Piece]:
    """Layers of a kind and a width as one piece."""

    def norm(layer: Any, x: Tensor) -> Tensor:
        return kernels.norm(x, layer.weight, layer.variance_epsilon, 0.0, "llama", False)

    def mlp(layer: Any, x: Tensor) -> Tensor:
        return layer.down_proj(kernels.gated(layer.gate_proj(x), layer.up_proj(x)))

    unfused = [module for module in model.modules() if "forward" not in vars(module)]
    norms = _by_width((len(module.weight), module) for module in unfused if is_rms_norm(module))
    mlps = _by_width((module.gate_proj.in_features, module) for module in unfused if _is_linear_mlp(module))
    for kind, groups, forward in (("RMSNorm", norms, norm), ("gated MLP", mlps, mlp)):
        for width, layers in groups.items():
            first, inputs = layers[0], cache(partial(_input, layers[0], width))
            own, liger = (partial(_layer_run, call, first, inputs) for call in (type(first).forward, forward))
            yield Piece(f"{kind} {width} wide", own, liger, partial(_replace_forward, layers, forward))


def _is_linear_mlp(module: nn.Module) -> bool:
    layers = gated_layers(module)
    return bool(layers) and all(hasattr(layer, "in_features") for layer in layers)


def _by_width(found: Iterator[tuple[int, nn.Module]]) -> dict[int, list[nn.Module]]:
    groups: dict[int, list[nn.Module]] = {}
    for width, module in found:
        groups.setdefault(width, []).append(module)
    return groups


def _input(layer: nn.Module, width: int) -> Tensor:
    like = next(layer.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()  # weights in 4 bits are integers
    chance = torch.Generator().manual_seed(0)
    return torch.randn(1, TRIAL_TOKENS, width, generator=chance).to(like.device, dtype).requires_grad_()


def _layer_run(call: Callable[..., Tensor], layer: nn.Module, inputs: Callable[[], Tensor]) -> Outcome:
    x = inputs()
    out = call(layer, x)
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *learned], torch.ones_like(out))]


def _replace_forward(layers: Sequence[Any], forward: Callable[..., Tensor]) -> None:
    for layer in layers:
        layer.forward = MethodType(forward, layer)
        _undo.append(partial(delattr, layer, "forward"))


def _rotary(model: Any, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> Iterator[Piece]:
    """The function that turns queries and keys by their positions, in each file of transformers that has attention."""

    def liger(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return kernels.rotary(query, key, cos, sin, None, unsqueeze_dim)

    turning = next((each for each in model.modules() if type(each).__name__.endswith("RotaryEmbedding")), None)
    files = {type(each).__module__ for each in model.modules() if type(each).__name__.endswith("Attention")}
    for home in (sys.modules[name] for name in sorted(files)):
        if turning is not None and _takes_rotary(home):
            heads, groups, width = head_shape(model.config)
            inputs = cache(partial(_turned_input, turning, (heads, groups, width), dtype, device))
            own, theirs = (partial(_rotary_run, call, inputs) for call in (getattr(home, ROTARY), liger))
            what = f"rotary positions of {heads} heads and {groups} for keys, {width} wide"
            yield Piece(what, own, theirs, partial(_replace_function, home, liger))


def _takes_rotary(home: ModuleType) -> bool:
    return hasattr(home, ROTARY) and list(inspect.signature(getattr(home, ROTARY)).parameters) == ROTARY_ARGUMENTS


def _turned_input(
    turning: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Query and key (1, tokens, heads, width), and cosine and sine of the model's own positions."""
    heads, groups, width = shape
    chance = torch.Generator().manual_seed(0)
    made = [torch.randn(1, TRIAL_TOKENS, number, width, generator=chance) for number in (heads, groups)]
    query, key = (each.to(device, dtype).requires_grad_() for each in made)
    return query, key, *turning(query.detach(), torch.arange(TRIAL_TOKENS, device=device)[None])


def _rotary_run(call: Callable[..., tuple[Tensor, Tensor]], inputs: Callable[[], tuple[Tensor, ...]]) -> Outcome:
    query, key, cos, sin = inputs()
    turned = call((query * 1).transpose(1, 2), (key * 1).transpose(1, 2), cos, sin)  # Liger's turns them in place
    gradients = torch.autograd.grad(turned, (query, key), [torch.ones_like(each) for each in turned])
    return [*(each.detach() for each in turned), *gradients]


def _replace_function(home: ModuleType, function: Callable[..., Any]) -> None:
    _undo.append(partial(setattr, home, ROTARY, getattr(home, ROTARY)))
    setattr(home, ROTARY, function)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("liger_kernel"):
        return "liger-kernel is not installed"
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _say(what: str) -> None:
    print(f"Liger kernels: {what}", flush=True)
