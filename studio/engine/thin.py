"""Linear layers for a handful of rows, as decoding has them: few calls, and weights as a processor likes to read them.

Layers that read the same input are joined to one product, whose weight begins where a line of the cache does: those of
a mapped file need not, and reading them takes a third longer. PyTorch lays a bfloat16 weight out anew for every product
on a CPU, as if many rows were to come. With the factors exchanged, (x Wᵀ)ᵀ = W xᵀ, it rearranges the few rows instead.
The sums are the same. Which way is faster is measured on the model's layers, not assumed.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from studio.engine.generate import quiet
from studio.engine.joint import Joint, Worn, join, same_input

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
        room = _Room()
        joints = [_Thin(group, room) for group in same_input(model, layers)]
    exchanged = _is_faster([joint.weight for joint in joints[:: max(1, len(joints) // NUM_MEASURED)]])
    for joint in joints:
        joint.most_rows = MOST_ROWS if exchanged else 0
    return exchanged


def _is_elsewhere(weight: Tensor) -> bool:
    return weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16)


class _Room:
    """Memory for what is given on within a product: one for all of them, so that it stays in the processor's cache."""

    def __init__(self) -> None:
        self._flat: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype, *shape: int) -> Tensor:
        num = math.prod(shape)
        if dtype not in self._flat or self._flat[dtype].numel() < num:
            self._flat[dtype] = torch.empty(num, dtype=dtype)
        return self._flat[dtype][:num].view(shape)


class _Thin(Joint):
    """Plain linear layers. Their weights are parts of one, and the narrow side of adapters is written below them."""

    def __init__(self, layers: Sequence[nn.Linear], room: _Room) -> None:
        super().__init__(nn.Identity(), [layer.out_features for layer in layers])
        self._layers, self.room = layers, room
        self.most_rows = 0  # that are computed with the factors exchanged
        self.num_out = sum(self.sizes)
        self._step: _Step | None = None
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._take(torch.cat([layer.weight.data for layer in layers]))
        join(layers, self)

    def lay(self, down: Tensor, ups: Sequence[Tensor]) -> None:
        super().lay(down, ups)
        end = self.num_out + len(down)
        if end > len(self.weight):
            room = self.weight.new_empty(len(down), down.shape[1])
            self._take(torch.cat([self.weight[: self.num_out], room]))
        self.weight[self.num_out : end] = down

    def send(self, worn: Worn | None) -> None:
        super().send(worn)
        self.read, self._step = self.weight[: self.num_out + (len(self.down) if worn else 0)], None

    def _take(self, weight: Tensor) -> None:
        """What all layers read from now on."""
        self.weight, self.read, self._step = weight, weight[: self.num_out], None
        for layer, part in zip(self._layers, self.read.split(self.sizes), strict=True):
            layer.weight.data = part

    def _computed(self, x: Tensor) -> Tensor:
        num_tokens = x.numel() // x.shape[-1]
        tokens = x.reshape(num_tokens, -1)
        if num_tokens == len(x) <= self.most_rows:
            out = self._stepped(tokens)
        else:
            out = self._dressed(tokens, len(x))
        if self._bias is not None:
            out = out + self._bias
        return out.view(*x.shape[:-1], -1)

    def _stepped(self, rows: Tensor) -> Tensor:
        """(rows, out) of a token of each row."""
        if self._step is None or self._step.num_rows != len(rows):
            self._step = _Step(self, len(rows))
        return self._step(rows)

    def _dressed(self, tokens: Tensor, num_rows: int) -> Tensor:
        """(tokens, out) of any number of tokens."""
        product = _product if len(tokens) <= self.most_rows else functional.linear
        both = product(tokens, self.read)
        out = both[:, : self.num_out]
        if self.worn is not None:
            those = self.worn.tokens(num_rows, len(tokens))
            worn = both[those].to(self.down.dtype, memory_format=torch.contiguous_format)
            self._add(worn[:, : self.num_out], worn[:, self.num_out :])
            out[those] = worn[:, : self.num_out]
        return out.contiguous()


class _Step:
    """The product for one token of each row, with all laid out that does not depend on the tokens.

    For a token or two, what a product costs is calls; laying things out is most of them.
    """

    @torch.inference_mode(False)  # what is made in the middle of an answer is written to at any time
    def __init__(self, joint: "_Thin", num_rows: int) -> None:
        self.num_rows, self._dtype = num_rows, joint.weight.dtype
        self._weight, self._sums, self._gate = joint.read, [], None
        out = joint.room.of(self._dtype, len(self._weight), num_rows)
        self._out, self._rows = (out if num_rows > 1 else out.squeeze(1)), out.t()
        self._both = self._rows
        if joint.worn is not None:
            those = joint.worn.tokens(num_rows, num_rows)
            if joint.down.dtype != self._dtype:
                self._both = joint.room.of(joint.down.dtype, num_rows, len(self._weight))
            worn, self._gate = self._both[those], joint.worn.gate
            self._narrow = worn[:, joint.num_out :]
            self._sums = joint.ups.sums(worn[:, : joint.num_out], self._narrow)
        self._said = self._both[:, : joint.num_out]

    def __call__(self, rows: Tensor) -> Tensor:
        """(rows, out) of rows (rows, in)."""
        if self.num_rows == 1:
            torch.mv(self._weight, rows[0], out=self._out)
        else:
            torch.mm(self._weight, rows.t(), out=self._out)
        if self._both is not self._rows:
            self._both.copy_(self._rows)
        if self._gate is not None:
            self._narrow.mul_(self._gate)
        for add in self._sums:
            add()
        return self._said.to(self._dtype, copy=True, memory_format=torch.contiguous_format)


def _product(tokens: Tensor, weight: Tensor) -> Tensor:
    """(tokens, out) from tokens (tokens, in) and a weight (out, in); what comes out may lie transposed."""
    if len(tokens) == 1:
        return torch.mv(weight, tokens[0]).unsqueeze(0)
    return torch.mm(weight, tokens.t()).t()


@torch.no_grad()
def _is_faster(weights: list[Tensor]) -> bool:
    """Whether one row and two are both computed faster the other way."""
    return all(_other_is_faster(weights, num_rows) for num_rows in (1, 2))


def _other_is_faster(weights: list[Tensor], num_rows: int) -> bool:
    """The best time of each weight counts, so that it matters little what else the machine does meanwhile."""
    inputs = [weight.new_ones(num_rows, weight.shape[1]) for weight in weights]
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [functional.linear, _product]
    best = torch.full((len(ways), len(weights)), torch.inf)
    for _ in range(ROUNDS):  # over all weights: one that was just used is in the processor's cache
        for way, product in enumerate(ways):
            taken = [_seconds(product, rows, weight) for weight, rows in zip(weights, inputs, strict=True)]
            best[way] = best[way].minimum(torch.tensor(taken))
    return bool(best[1].sum() < best[0].sum())


def _seconds(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor) -> float:
    began = time.perf_counter()
    product(rows, weight)
    return time.perf_counter() - began
