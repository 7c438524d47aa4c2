"""Parts of a layer with a frozen base and LoRA adapters: their arithmetic forwards and backwards, in few products.

A part has `lora`, the float32 weights that learn, and `forward(*inputs, lora)`, which returns the result and
`num_kept` tensors that the way back needs. `backward(*gradients, kept, below)` returns the gradient at the inputs (None
for what needs none; `below` says whether anything learns below the first), and in float32 that at `lora`. Tensors are
(tokens, width).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from studio.engine import pointwise
from studio.engine.allocator import forget_copied

# oneDNN (torch 2.13) leaves a product whose result is narrower than what is summed to one of two threads when it has
# more rows than that.
SHARED_ROWS = 512
FEW_THREADS = 4
ALIGNED = 32  # numbers: rows of 16-bit ones then begin where a line of a CPU's cache does

Gradients = tuple[list[Tensor | None], list[Tensor]]


class Part(Protocol):
    """What a node of the graph computes."""

    lora: list[Tensor]
    forward: Callable[..., tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]]
    backward: Callable[..., Gradients]


def weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a linear layer as numbers of that format; 4-bit ones are unpacked for the moment."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit  # costs seconds, and only qlora needs it

    return dequantize_4bit(base.weight, state).to(dtype)


class Linears:
    """xW + s·xAB of one or several PEFT layers that read the same, their results side by side.

    Where `joined`, plain weights become the first rows of one matrix, with room below for s·A of all layers: one
    product gives xW and s·xA, and one product of their gradients that of x. B of all stand in one matrix, each in
    columns of its own.
    """

    def __init__(self, layers: Sequence[Any], joined: bool = True) -> None:
        [name] = layers[0].lora_A
        downs, ups = [layer.lora_A[name].weight for layer in layers], [layer.lora_B[name].weight for layer in layers]
        self.lora = [*downs, *ups]
        self.widths, self.ranks = [len(up) for up in ups], [len(down) for down in downs]
        self.width, self._room = sum(self.widths), -(-sum(self.ranks) // ALIGNED) * ALIGNED
        self.scaling = layers[0].scaling[name]
        self._bases = [layer.get_base_layer() for layer in layers]
        self.whole = _join(self._bases, self._room) if joined else None
        self._narrow = None if self.whole is None else self._empty_narrow(self.whole)
        self.num_kept = 4 if self.whole is None else 2

    @property
    def up(self) -> Tensor | None:
        """B of all layers, each in rows and columns of its own, where `joined`; `ranks` columns of each count."""
        return self._narrow and self._narrow[1]

    def bias(self) -> Tensor | None:
        """Of all layers side by side, zeros where one has none; None where no layer has any."""
        biases = [base.bias for base in self._bases]
        if all(each is None for each in biases):
            return None
        pairs = zip(biases, self._bases, strict=True)
        return torch.cat([base.weight.new_zeros(len(base.weight)) if bias is None else bias for bias, base in pairs])

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        down, up = self._cast(x, lora)
        both = x.new_empty(len(x), self.width + self._room)
        for columns, weight in self._weights(x.dtype, down):
            _add_product(both[:, columns], x, weight.t(), beta=0)
        out, narrow = both[:, : self.width], both[:, self.width :].clone()
        for columns, base in zip(_slices(self.widths), self._bases, strict=True):
            if base.bias is not None:
                out[:, columns] += base.bias.to(x.dtype)
        kept = (x, narrow, down, up)
        return out.addmm_(narrow, up.t()), kept[: self.num_kept]

    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `backward` takes, to be filled, and the columns of it where the gradient belongs."""
        wide = x.new_empty(len(x), self.width + self._room)
        if self.width % ALIGNED:
            wide[:, self.width :] = 0  # oneDNN's AMX products read into it, times zero: unset memory may hold NaN
        return wide, wide[:, : self.width]

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        wide, own = self.room(gradient)
        own.copy_(gradient)
        return self.backward_in_room(wide, kept, below)

    def backward_in_room(self, wide: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        """As `backward`, the gradient in a `room` of its own."""
        x, narrow, *own = kept
        down, up = own or self._narrow[:2]
        gradient, d_narrow = wide[:, : self.width], wide[:, self.width :]
        torch.mm(gradient, up.to(x.dtype), out=d_narrow)
        d_down, d_up = (d_narrow.t() @ x).float().mul_(self.scaling), gradient.t() @ narrow
        d_downs = [d_down[rows] for rows in _slices(self.ranks)]
        blocks = zip(_slices(self.widths), _slices(self.ranks), strict=True)
        d_lora = [*d_downs, *(d_up[rows, columns].float() for rows, columns in blocks)]
        if not below:
            return [None], d_lora
        d_x, beta = torch.empty_like(x), 0
        for columns, weight in self._weights(x.dtype, down):
            _add_product(d_x, wide[:, columns], weight, beta)
            beta = 1
        return [d_x], d_lora

    def _cast(self, x: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """s·A and B of all layers as they are now, as numbers of the format of x."""
        down, up, blocks = self._narrow or self._empty_narrow(x)
        torch._foreach_copy_(blocks, list(lora))
        down.mul_(self.scaling)
        return down.to(x.dtype), up.to(x.dtype)

    def _empty_narrow(self, like: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Matrices for A and for B of all layers, and where in them each of `lora` stands."""
        down = like.new_zeros(self._room, self._bases[0].in_features)
        if self.whole is not None:
            down = self.whole[self.width :]
        up, columns = like.new_zeros(self.width, self._room), list(_slices(self.ranks))
        blocks = [up[place] for place in zip(_slices(self.widths), columns, strict=True)]
        return down, up, [*(down[rows] for rows in columns), *blocks]

    def _weights(self, dtype: torch.dtype, down: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the product, and the weight that they come from; 4-bit ones one after another."""
        if self.whole is not None:
            yield slice(None), self.whole.to(dtype)
            return
        for columns, base in zip(_slices(self.widths), self._bases, strict=True):
            yield columns, weight_of(base, dtype)
        yield slice(self.width, None), down


class GatedMlp:
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, gate: Any, up: Any, down: Any) -> None:
        self.wide, self.down = Linears([gate, up]), Linears([down])
        self.lora = [*self.wide.lora, *self.down.lora]
        self.num_kept = 1 + self.wide.num_kept + self.down.num_kept

    def forward(self, x: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate_up, kept = self.wide.forward(x, lora[:4])
        out, kept_down = self.down.forward(pointwise.now.gated(*gate_up.split(self.wide.widths, 1)), lora[4:])
        return out, (gate_up, *kept, *kept_down)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        gate_up, kept_wide, kept_down = _split(kept, 1, self.wide.num_kept)
        [d_through], d_down = self.down.backward(gradient, kept_down, True)
        wide, d_gate_up = self.wide.room(d_through)
        gradients = pointwise.now.gated_gradient(d_through, *gate_up[0].split(self.wide.widths, 1))
        for own, each in zip(d_gate_up.split(self.wide.widths, 1), gradients, strict=True):
            own.copy_(each)
        d_x, d_wide = self.wide.backward_in_room(wide, kept_wide, below)
        return d_x, [*d_wide, *d_down]


class Norm:
    """x / sqrt(mean(x²) + epsilon) · weight, the weight frozen."""

    num_kept = 3
    lora: list[Tensor] = []

    def __init__(self, norm: Any) -> None:
        self._norm, self.epsilon = norm, norm.variance_epsilon

    @property
    def weight(self) -> Tensor:
        return self._norm.weight

    def forward(self, x: Tensor, _: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, scale = pointwise.now.norm(x, self.weight, self.epsilon)
        return out, (x, self.weight, scale)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], _: bool) -> Gradients:
        return [pointwise.now.norm_gradient(gradient, *kept)], []


class Heads:
    """From a layer's input to query, key (both turned by their position) and value: each (tokens, heads, width).

    Other inputs: cosines and sines (tokens, width) of the positions' angles.
    """

    def __init__(self, norm: Norm, attention: Any) -> None:
        self.norm = norm
        self.linears = Linears([attention.q_proj, attention.k_proj, attention.v_proj])
        self.lora = self.linears.lora

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, lora: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        normed, kept_norm = self.norm.forward(x, ())
        states, kept = self.linears.forward(normed, lora)
        query, key, value = (each.unflatten(1, (-1, cos.shape[1])) for each in states.split(self.linears.widths, 1))
        cos, low, high = cos[:, None], *sin[:, None].chunk(2, -1)
        heads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key)]
        for each, out in zip((query, key), heads, strict=True):
            _turn(each, cos, low, high, 1, out)
        return (*heads, value.contiguous()), (cos, low, high, *kept_norm, *kept)

    def backward(self, query: Tensor, key: Tensor, value: Tensor, kept: Sequence[Tensor], below: bool) -> Gradients:
        (cos, low, high), kept_norm, kept = _split(kept, 3, self.norm.num_kept)
        wide, d_states = self.linears.room(kept[0])
        own = [each.unflatten(1, (-1, cos.shape[-1])) for each in d_states.split(self.linears.widths, 1)]
        for each, out in zip((query, key), own, strict=False):
            _turn(each, cos, high, low, -1, out)
        own[2].copy_(value)
        [d_normed], d_lora = self.linears.backward_in_room(wide, kept, below)
        d_x = self.norm.backward(d_normed, kept_norm, below)[0] if below else [None]
        return [*d_x, None, None], d_lora


class Rest:
    """What a layer does after its attention: x + o(attended), then that + mlp(norm(that)). Inputs: x, attended."""

    def __init__(self, out: Any, norm: Norm, mlp: GatedMlp) -> None:
        self.out, self.norm, self.mlp = Linears([out]), norm, mlp
        self.lora = [*self.out.lora, *mlp.lora]

    def forward(self, x: Tensor, attended: Tensor, lora: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        between, kept_out = self.out.forward(attended, lora[:2])
        normed, kept_norm = self.norm.forward(between.add_(x), ())
        out, kept_mlp = self.mlp.forward(normed, lora[2:])
        return out.add_(between), (*kept_out, *kept_norm, *kept_mlp)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], _: bool) -> Gradients:
        kept_out, kept_norm, kept_mlp = _split(kept, self.out.num_kept, self.norm.num_kept)
        [d_normed], d_mlp = self.mlp.backward(gradient, kept_mlp, True)
        [d_between], _ = self.norm.backward(d_normed, kept_norm, True)
        [d_attended], d_out = self.out.backward(d_between.add_(gradient), kept_out, True)
        return [d_between, d_attended], [*d_out, *d_mlp]


def _turn(states: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int, out: Tensor) -> None:
    """Into `out`, states · cos, less the second half · `first` and with the first half · `second`; the other way round
    where `sign` is -1. states, out: (tokens, heads, width)."""
    half = states.shape[-1] // 2
    torch.mul(states, cos, out=out)
    out[..., :half].addcmul_(states[..., half:], first, value=-sign)
    out[..., half:].addcmul_(states[..., :half], second, value=sign)


def _split(kept: Sequence[Tensor], first: int, second: int) -> tuple[Sequence[Tensor], ...]:
    return kept[:first], kept[first : first + second], kept[first + second :]


def _join(bases: Sequence[Any], room: int) -> Tensor | None:
    """One matrix with the bases' weights as its first rows, which are theirs from now on, and `room` zero rows.

    None where the weights are not plain numbers of one kind in one place.
    """
    weights = [base.weight for base in bases]
    kinds = {(each.dtype, each.device) for each in weights}
    if len(kinds) > 1 or any(hasattr(each, "quant_state") for each in weights):
        return None
    whole = torch.cat([*(each.data for each in weights), weights[0].data.new_zeros(room, weights[0].shape[1])])
    for weight, rows in zip(weights, _slices([len(each) for each in weights]), strict=True):
        if weight.device.type == "cpu":
            forget_copied(weight.data_ptr(), weight.nbytes)
        weight.data = whole[rows]
    return whole


def _slices(widths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for width in widths:
        yield slice(start, start + width)
        start += width


def _add_product(total: Tensor, x: Tensor, weight: Tensor, beta: int) -> None:
    """Add x @ weight to `total` times `beta`, in pieces that are shared among few threads."""
    is_narrower = x.device.type == "cpu" and weight.shape[1] < weight.shape[0]
    pieces = is_narrower and 1 < torch.get_num_threads() <= FEW_THREADS
    size = SHARED_ROWS if pieces else len(x)
    for start in range(0, len(x), size):
        total[start : start + size].addmm_(x[start : start + size], weight, beta=beta)
