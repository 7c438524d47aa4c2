"""Linear layers that read the same input as one product, to which what adapters say is added.

Queries, keys and values are three products of one input, the two halves of a gated MLP are two. For a token or two a
product of its own costs each of them more in calls than in arithmetic, and each adapter's narrow products even more so:
every weight that is read drives what the calls need out of the processor's cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Worn:
    """Which rows of a batch wear what was laid: from `first` to before `end` of `num_rows`.

    `gate` (rows that wear, ranks): 1 where a column of the ranks is of the row's own adapter, else 0; None when all
    are 1. The default: every row of any batch wears all.
    """

    first: int = 0
    end: int = 0
    num_rows: int = 0
    gate: Tensor | None = None

    def tokens(self, num_rows: int, num_tokens: int) -> slice:
        """Where the tokens of these rows stand. Raises ValueError where a layer mixes the rows of a batch."""
        if not self.num_rows:
            return slice(None)
        if num_rows != self.num_rows:
            raise rows_are_mixed()
        each = num_tokens // num_rows
        return slice(self.first * each, self.end * each)


class Ups:
    """The wide sides of adapters, of layers side by side: `ups` has one for each layer, (ranks, width).

    Neighbours of one shape are one call; zeros between layers of different inputs would have to be read.
    """

    def __init__(self, ups: Sequence[Tensor]) -> None:
        self._runs: list[tuple[int, int, Tensor]] = []  # (first column, first rank, (layers, ranks, width))
        column = rank = 0
        for (num_ranks, width), group in groupby(ups, key=lambda up: up.shape):
            run = torch.stack(list(group)).contiguous()
            if num_ranks:
                self._runs.append((column, rank, run))
            column, rank = column + len(run) * width, rank + len(run) * num_ranks

    def sums(self, wide: Tensor, narrow: Tensor) -> list[Callable[[], Tensor]]:
        """Calls that add to `wide` (tokens, widths) in place what `narrow` (tokens, ranks) gives."""
        return [_sum(wide[:, column:], narrow[:, rank:], run) for column, rank, run in self._runs]


def _sum(wide: Tensor, narrow: Tensor, run: Tensor) -> Callable[[], Tensor]:
    num, num_ranks, width = run.shape
    wide, narrow = wide[:, : num * width], narrow[:, : num * num_ranks]
    if num == 1:
        return partial(wide.addmm_, narrow, run[0])
    apart = [each.unflatten(1, (num, -1)).transpose(0, 1) for each in (wide, narrow)]
    return partial(apart[0].baddbmm_, apart[1], run)


class Joint:
    """Layers that read the same input. The first that is asked computes what the others will give for that input.

    `product` gives what all of them say, side by side; `sizes` are their widths.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._product = product
        self._input: Tensor | None = None  # held, so that no other tensor can be taken for it
        self._said: list[Tensor | None] = []
        self.down, self.ups = torch.empty(0, 0), Ups([])
        self.worn: Worn | None = None

    def forward(self, number: int, x: Tensor) -> Tensor:
        """Of the layer with this number. What was given once is computed anew, as its reader may change it."""
        if len(self.sizes) == 1:
            return self._computed(x)
        said = self._said[number] if x is self._input else None
        if said is None:
            self._input, self._said = x, [*self._computed(x).split(self.sizes, dim=-1)]
            said = self._said[number]
        self._said[number] = None
        if not any(each is not None for each in self._said):
            self._input = None
        assert said is not None
        return said

    def lay(self, down: Tensor, ups: Sequence[Tensor]) -> None:
        """Adapters side by side: (x · `down`ᵀ) · up is what they add to a layer.

        `down` (ranks of all layers, in); `ups` has one for each layer, (its ranks, its width), of the same number
        format.
        """
        self.down, self.ups = down, Ups(ups)

    def send(self, worn: Worn | None) -> None:
        """Which rows of the following batches wear what was laid; None for none of them."""
        self.worn = worn

    def _computed(self, x: Tensor) -> Tensor:
        """(…, out) of x (…, in)."""
        out = self._product(x)
        if self.worn is None:
            return out
        flat, tokens = out.flatten(0, -2), x.flatten(0, -2)
        those = self.worn.tokens(len(x), len(flat))
        wide = flat[those].to(self.down.dtype)
        self._add(wide, nn.functional.linear(tokens[those].to(self.down.dtype), self.down))
        flat[those] = wide
        return flat.view(out.shape)

    def _add(self, wide: Tensor, narrow: Tensor) -> None:
        """Add what adapters say to `wide` (tokens, out), of rows that wear some; `narrow` (tokens, ranks) changes."""
        gate = self.worn.gate if self.worn else None
        if gate is not None:
            narrow.mul_(gate.repeat_interleave(len(narrow) // len(gate), dim=0))
        for add in self.ups.sums(wide, narrow):
            add()


def rows_are_mixed() -> ValueError:
    """As a mixture of experts does: what it gives its layers are tokens of all rows."""
    return ValueError("this layer mixes the rows of a batch, so they cannot wear different adapters")


def join(layers: Sequence[nn.Module], joint: Joint) -> None:
    """Let these layers compute together."""
    for number, layer in enumerate(layers):
        layer.forward = partial(joint.forward, number)


def joint_of(layer: Any) -> tuple[Joint, int] | None:
    """The joint product that a layer is a part of, and its number there; None for a layer on its own."""
    forward = vars(layer).get("forward")
    joint = getattr(getattr(forward, "func", None), "__self__", None)
    return (joint, forward.args[0]) if isinstance(joint, Joint) else None


@torch.no_grad()
def same_input(model: nn.Module, layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """The layers in groups that read the same tensor when the model reads a token."""
    groups: dict[object, list[nn.Linear]] = {}
    for layer, inputs in _inputs_of(model, layers, 1, 1).items():
        read = tuple(map(id, inputs)) or id(layer)
        groups.setdefault((read, layer.weight.dtype, layer.bias is None), []).append(layer)
    return list(groups.values())


@torch.no_grad()
def keeps_rows_apart(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether each of the layers is given a batch's rows as rows, and not tokens of all of them."""
    num_rows, num_tokens = 2, 5
    found = _inputs_of(model, layers, num_rows, num_tokens)
    return {len(each) for inputs in found.values() for each in inputs} <= {num_rows}


def _inputs_of(model: nn.Module, layers: Sequence[Layer], num_rows: int, num_tokens: int) -> dict[Layer, list[Tensor]]:
    """What each layer is given while the model reads so many rows of so many tokens."""
    seen: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0])) for layer in layers]
    try:
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
