"""Linear layers that read the same input as one product, to which what adapters say is added.

Queries, keys and values are three products of one input, the two halves of a gated MLP are two. For a token or two a
product of its own costs each of them more in calls than in arithmetic, and each adapter's narrow products even more so:
every weight that is read drives what the calls need out of the processor's cache.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class Joint:
    """Layers that read the same input. The first that is asked computes what the others will give for that input.

    `product` gives what all of them say, side by side; `sizes` are their widths.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._product = product
        self._input: Tensor | None = None  # held, so that no other tensor can be taken for it
        self._said: list[Tensor | None] = []
        self._down = self._up = torch.empty(0, 0)
        self._is_worn = False
        self._gate: Tensor | None = None

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

    def lay(self, down: Tensor, up: Tensor) -> None:
        """Adapters side by side: (x · `down`ᵀ) · `up` is what they add. `down` (ranks, in), `up` (ranks, out)."""
        self._down, self._up = down, up

    def send(self, is_worn: bool, gate: Tensor | None = None) -> None:
        """Whether any row of the following batches wears what was laid.

        `gate` (rows, ranks): 1 where a column of the ranks is of the row's own adapter, else 0; None when all are 1.
        """
        self._is_worn, self._gate = is_worn, gate

    def _computed(self, x: Tensor) -> Tensor:
        """(…, out) of x (…, in)."""
        out = self._product(x)
        if not self._is_worn:
            return out
        narrow = nn.functional.linear(x.to(self._down.dtype), self._down).view(-1, len(self._down))
        wide = out.reshape(len(narrow), -1).to(narrow.dtype)
        return self._add(wide, narrow, len(x)).to(out.dtype).view(out.shape)

    def _add(self, wide: Tensor, narrow: Tensor, num_rows: int) -> Tensor:
        """Add what adapters say to `wide` (tokens, out), and return it; `narrow` (tokens, ranks) is changed too.

        Raises ValueError where a layer mixes the rows of a batch.
        """
        gate = self._gate
        if gate is not None:
            if num_rows != len(gate):
                raise rows_are_mixed()
            narrow.mul_(gate if len(narrow) == num_rows else gate.repeat_interleave(len(narrow) // num_rows, dim=0))
        return wide.addmm_(narrow, self._up)


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
