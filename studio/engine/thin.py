"""Linear layers for a handful of rows, as decoding has them: few calls, and weights as a processor likes to read them.

Layers that read the same input are joined to one product, whose weight begins where a line of the cache does: those of
a mapped file need not, and reading them takes a third longer. PyTorch lays a bfloat16 weight out anew for every product
on a CPU, as if many rows were to come. With the factors exchanged, (x Wᵀ)ᵀ = W xᵀ, it rearranges the few rows instead.
The sums are the same. Which way is faster is measured on the model's layers, not assumed.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from studio.engine.generate import quiet
from studio.engine.joint import Joint, join, same_input

MOST_ROWS = 32  # tokens of a product up to which the other way is taken
ROUNDS = 8
NUM_MEASURED = 16  # layers; a few, so that their weights do not all stay in the processor's cache


def thin_out(model: nn.Module) -> bool:
    """Let the model's linear layers compute together, few rows the other way where that is faster; whether it is.

    For inference on a CPU: no gradient flows. Layers with quantized weights stay as they are.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    if not layers or any(_is_elsewhere(layer.weight) for layer in layers):
        return False
    with quiet(model):
        joints = [_Thin(group) for group in same_input(model, layers)]
    exchanged = _is_faster([joint.weight for joint in joints[:: max(1, len(joints) // NUM_MEASURED)]])
    for joint in joints:
        joint.most_rows = MOST_ROWS if exchanged else 0
    return exchanged


def _is_elsewhere(weight: Tensor) -> bool:
    return weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16)


class _Thin(Joint):
    """Plain linear layers. Their weights are parts of one, and the narrow side of adapters is written below them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(nn.Identity(), [layer.out_features for layer in layers])
        self._layers = layers
        self.most_rows = 0  # that are computed with the factors exchanged
        self._num_out = sum(self.sizes)
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._take(torch.cat([layer.weight.data for layer in layers]))
        join(layers, self)

    def lay(self, down: Tensor, up: Tensor) -> None:
        end = self._num_out + len(down)
        if end > len(self.weight):
            room = self.weight.new_empty(len(down), down.shape[1])
            self._take(torch.cat([self.weight[: self._num_out], room]))
        self.weight[self._num_out : end] = down
        self._up, self._parts = up, [self._num_out, len(down)]

    def send(self, is_worn: bool, gate: Tensor | None = None) -> None:
        super().send(is_worn, gate)
        self._read = self.weight[: self._num_out + (len(self._up) if is_worn else 0)]

    def _take(self, weight: Tensor) -> None:
        """What all layers read from now on."""
        self.weight, self._read = weight, weight[: self._num_out]
        for layer, part in zip(self._layers, self._read.split(self.sizes), strict=True):
            layer.weight.data = part

    def _computed(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        product = _product if num_rows <= self.most_rows else _usual_product
        out = product(self._read, x.reshape(num_rows, -1))
        if self._is_worn:
            both = out.to(self._up.dtype, memory_format=torch.contiguous_format)
            wide, narrow = both.split_with_sizes(self._parts, dim=1)
            out = self._add(wide, narrow, len(x)).to(out.dtype)
        if self._bias is not None:
            out = out + self._bias
        return out.contiguous().view(*x.shape[:-1], -1)


def _usual_product(weight: Tensor, rows: Tensor) -> Tensor:
    """(rows, out) from a weight (out, in) and rows (rows, in)."""
    return functional.linear(rows, weight)


def _product(weight: Tensor, rows: Tensor) -> Tensor:
    """The same the other way; what comes out may lie transposed."""
    if len(rows) == 1:
        return torch.mv(weight, rows[0]).unsqueeze(0)
    return torch.mm(weight, rows.t()).t()


@torch.no_grad()
def _is_faster(weights: list[Tensor]) -> bool:
    """Whether one row and two are both computed faster the other way."""
    return all(_other_is_faster(weights, num_rows) for num_rows in (1, 2))


def _other_is_faster(weights: list[Tensor], num_rows: int) -> bool:
    """The best time of each weight counts, so that it matters little what else the machine does meanwhile."""
    inputs = [weight.new_ones(num_rows, weight.shape[1]) for weight in weights]
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [_usual_product, _product]
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
