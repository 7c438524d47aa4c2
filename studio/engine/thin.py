"""Linear layers for a handful of rows, as decoding has them: the weight is read once and not rearranged before.

PyTorch lays a bfloat16 weight out anew for every product on a CPU, as if many rows were to come. With the factors
exchanged, (x Wᵀ)ᵀ = W xᵀ, it rearranges the few rows instead. The sums are the same. Which way is faster is measured
on one of the model's layers, not assumed.
"""

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_ROWS = 32  # tokens of a product up to which the other way is taken
ROUNDS = 5
NUM_MEASURED = 16  # layers; a few, so that their weights do not all stay in the processor's cache


def thin_out(model: nn.Module) -> bool:
    """Let the model's linear layers compute few rows the other way, where that is faster; returns whether it is.

    For inference on a CPU: no gradient flows. Layers with quantized weights stay as they are.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    if not layers or not _is_faster(layers[:: max(1, len(layers) // NUM_MEASURED)]):
        return False
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return True


def _forward(layer: Any, x: Tensor) -> Tensor:
    num_rows = x.numel() // x.shape[-1]
    if num_rows > MOST_ROWS:
        return functional.linear(x, layer.weight, layer.bias)
    out = _product(layer.weight, x.reshape(num_rows, -1)).view(*x.shape[:-1], -1)
    return out if layer.bias is None else out + layer.bias


def _product(weight: Tensor, rows: Tensor) -> Tensor:
    """(rows, out) from a weight (out, in) and rows (rows, in)."""
    if len(rows) == 1:
        return torch.mv(weight, rows[0]).unsqueeze(0)
    return torch.mm(weight, rows.t()).t().contiguous()


@torch.no_grad()
def _is_faster(layers: list[nn.Linear]) -> bool:
    """Whether one row and two are both computed faster the other way."""
    weights = [layer.weight for layer in layers]
    if any(weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) for weight in weights):
        return False
    return all(_other_is_faster(weights, num_rows) for num_rows in (1, 2))


def _other_is_faster(weights: list[Tensor], num_rows: int) -> bool:
    """The best time of each weight counts, so that it matters little what else the machine does meanwhile."""
    inputs = [weight.new_ones(num_rows, weight.shape[1]) for weight in weights]
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [lambda weight, rows: functional.linear(rows, weight), _product]
    best = torch.full((len(ways), len(weights)), torch.inf)
    for _ in range(ROUNDS):  # over all weights: one that was just used is in the processor's cache
        for way, product in enumerate(ways):
            taken = [_seconds(product, weight, rows) for weight, rows in zip(weights, inputs, strict=True)]
            best[way] = best[way].minimum(torch.tensor(taken))
    return bool(best[1].sum() < best[0].sum())


def _seconds(product: Callable[[Tensor, Tensor], Tensor], weight: Tensor, rows: Tensor) -> float:
    began = time.perf_counter()
    product(weight, rows)
    return time.perf_counter() - began
