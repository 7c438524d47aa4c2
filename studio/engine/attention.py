"""Attention over a row of tokens that holds many examples: each blind to the others, what they share computed once.

Token i of a row sees j <= i where i < ends[j]: a prefix tree in depth-first order, or several one after another. On a
CPU the row is cut into blocks for plain matrix products (blocks.py), on CUDA into chains for kernels of sequences of
different lengths, or it goes to FlexAttention (cuda/flex.py), whichever is faster there; elsewhere it runs with a mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from studio.data.packing import Ints, few_rooms
from studio.engine.blocks import Blocks, cut, hidden_from
from studio.engine.cuda import measured
from studio.engine.cuda.flex import Flex
from studio.engine.models.load import GPU_KERNELS, has_needed

NAME = "retune"  # under which transformers finds this attention
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
TRIAL_TOKENS = 4096  # in the row on which kinds are compared


class Layout(Protocol):
    """Who sees whom in a row of tokens, ready to compute with: by `attend`, or by a kernel that takes the `mask`.

    `mask`: (1, 1, tokens, tokens), true where a token sees another. `tensors`: what `attend` and the kernel read of it;
    of two layouts with tensors of the same shapes one can stand for the other once it has the other's numbers.
    """

    mask: Tensor | None
    tensors: Sequence[Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(tokens, heads, width) from a query (heads, tokens, width), key and value (key heads, tokens, width)."""


class Masked:
    """For whatever attention of transformers takes a mask."""

    def __init__(self, ends: Ints, device: torch.device) -> None:
        self.mask: Tensor | None = ~hidden_from(ends, 0, len(ends))[None, None].to(device)
        self.tensors = [self.mask]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        num_groups = query.shape[0] // key.shape[0]
        key, value = (each.repeat_interleave(num_groups, 0)[None] for each in (key, value))
        out = functional.scaled_dot_product_attention(query[None], key, value, attn_mask=self.mask, scale=scaling)
        return out[0].transpose(0, 1)


class Chains:
    """For kernels of sequences of different lengths: each chain of the tree is one, its keys led by its ancestors'.

    `kernel` gets query, key, value (tokens, heads, width), where queries and keys of a sequence begin and end, the
    longest of each, and the scaling; it is causal from a sequence's last key backwards. `fixed`: the row ends in a
    filler, and the numbers of keys and of sequences are filled up to one of few, too: by keys that the filler sees, and
    by sequences of no token.
    """

    mask: Tensor | None = None

    def __init__(self, ends: Ints, device: torch.device, kernel: Callable[..., Tensor], fixed: bool = False) -> None:
        blocks = sorted(cut(ends, 1, len(ends)), key=lambda block: block.start)
        keys = [np.arange(start, end) for block in blocks for start, end in (*block.before, (block.start, block.end))]
        sizes, num_keys = [block.size for block in blocks], [block.num_keys for block in blocks]
        self._longest = max(sizes), max(num_keys)
        if fixed:
            more = few_rooms(sum(num_keys)) - sum(num_keys)
            keys.insert(-1, np.zeros(more, np.int64))
            num_keys[-1] += more
            nobody = [0] * (few_rooms(len(sizes)) - len(sizes))
            sizes, num_keys = [*sizes, *nobody], [*num_keys, *nobody]
            self._longest = len(ends), sum(num_keys)
        places = torch.from_numpy(np.concatenate(keys))
        self._shares = fixed or len(places) > len(ends)
        self.tensors = [each.to(device) for each in (places, _borders(sizes), _borders(num_keys))]
        self._kernel = kernel

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        places, *borders = self.tensors
        if self._shares:
            key, value = key.index_select(0, places), value.index_select(0, places)
        return self._kernel(query.contiguous(), key.contiguous(), value.contiguous(), *borders, *self._longest, scaling)


def _borders(sizes: list[int]) -> Tensor:
    """Where sequences of these sizes begin and end in one row, int32."""
    return torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32))


def choices(
    name: str, config: Any, longest: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, str]]:
    """Kinds of attention for rows with a layout, best first, each with the reason; none where a model forbids all.

    `name` is a config's model.attention, `config` the model's, `longest` the longest example in tokens. A window that
    is shorter than that would be lost, and dropout inside attention only transformers' own kernels compute.
    """
    windows = (getattr(config, each, None) for each in ("sliding_window", "attention_chunk_size"))
    if any(window is not None and window < longest for window in windows):
        return
    if not any(getattr(config, each, 0) for each in ATTENTION_DROPOUTS):
        if name in GPU_KERNELS:
            yield name, "as configured"
        if name == "blocks" or name == "auto" and device.type == "cpu":
            yield "blocks", "a CPU computes short segments fastest as plain matrix products"
        if name == "auto" and device.type == "cuda":
            yield from _measured(config, longest, dtype, device)
    if name == "eager":
        yield "eager", "as configured"
    elif name in ("auto", "sdpa", "blocks"):
        yield "sdpa", "as configured" if name == "sdpa" else "PyTorch's kernel with a mask, which any device has"


def _measured(config: Any, longest: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, str]]:
    """The kinds that this GPU computes, the fastest first."""
    heads, groups, width = head_shape(config)
    what = f"attention, {heads} heads and {groups} for keys, {width} wide, {dtype}, examples of {longest} tokens"
    shapes = [(number, TRIAL_TOKENS, width) for number in (heads, groups, groups)]
    ways = {kind: _trial(kind, typical_row(longest), shapes, dtype, device) for kind in _gpu_kinds(dtype, device)}
    choice = measured.fastest(what, ways, device)
    yield from ((kind, choice.why) for kind in choice.ranked)


def head_shape(config: Any) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and the width of one, by a model's config."""
    heads = getattr(config, "num_attention_heads", 8)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 64 * heads) // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def _trial(
    kind: str, ends: Ints, shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> measured.Way:
    """What computes a row forward and backward; its layout is made when that is first called."""
    layout = cache(partial(make_layout, kind, ends, device))

    @torch.enable_grad()
    def run() -> tuple[Tensor, ...]:
        inputs = [torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        out = layout().attend(*inputs, shapes[0][-1] ** -0.5)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def _gpu_kinds(dtype: torch.dtype, device: torch.device) -> list[str]:
    """What may run here. Flash kernels compute 16-bit numbers on GPUs from compute capability 8.0."""
    flash = dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return [*(kind for kind in GPU_KERNELS if has_needed(kind) and (flash or kind == "flex")), "sdpa"]


def typical_row(longest: int) -> Ints:
    """`ends` of a row to compare kinds on: examples of half the longest length, a quarter of that seen by all."""
    length = min(max(longest // 2, 8), TRIAL_TOKENS)
    shared = length // 4
    places = np.arange(TRIAL_TOKENS - shared)
    own_ends = np.minimum((places // (length - shared) + 1) * (length - shared) + shared, TRIAL_TOKENS)
    return np.concatenate([np.full(shared, TRIAL_TOKENS), own_ends]).astype(np.int64)


def make_layout(kind: str, ends: Ints, device: torch.device, fixed: bool = False) -> Layout:
    """The layout of a row for a kind of attention; `fixed` rows end in a filler."""
    if kind == "blocks":
        return Blocks(ends)
    if kind == "flex":
        return Flex(ends, device)
    if kind in ("varlen", "flash_attention_2"):
        return Chains(ends, device, _varlen if kind == "varlen" else _flash, fixed)
    return Masked(ends, device)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int, most: int, scaling: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    borders = (queries, keys, longest, most)
    return varlen_attn(query, key, value, *borders, scale=scaling, window_size=(-1, 0), enable_gqa=True)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int, most: int, scaling: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # an extra, CUDA only

    borders = (queries, keys, longest, most)
    return flash_attn_varlen_func(query, key, value, *borders, softmax_scale=scaling, causal=True)


def adopt(model: Any, kind: str) -> str:
    """Let a transformers model compute attention of this kind from now on; returns the kind.

    Raises ValueError for an architecture that takes no attention from outside.
    """
    wanted = kind if kind in ("sdpa", "eager") else NAME
    model.set_attn_implementation(wanted)
    if model.config._attn_implementation != wanted:
        raise ValueError(f"{type(model).__name__} computes its attention by itself")
    return kind


_layout: Layout | None = None


@contextmanager
def following(layout: Layout | None) -> Iterator[None]:
    """Forward and backward passes inside see as the layout says; None is transformers' own SDPA."""
    global _layout
    before, _layout = _layout, layout
    try:
        yield
    finally:
        _layout = before


def has_more(dropout: float = 0.0, **kwargs: Any) -> bool:
    """Whether an architecture asks for more than layouts compute. `kwargs`: what transformers passes to attention."""
    return bool(dropout) or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))


def compiled_row(num_heads: int, scaling: float, states: Tensor) -> tuple[Any, bool] | None:
    """As Blocks.compiled, of the row that is followed; None where there is none, or one of another kind."""
    return _layout.compiled(num_heads, scaling, states) if isinstance(_layout, Blocks) else None


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (1, heads, tokens, width) to (1, tokens, heads, width)."""
    if _layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if has_more(dropout, **kwargs):
        raise ValueError("this attention has more to it than blocks compute")
    row = (each.squeeze(0).to(value.dtype) for each in (query, key, value))  # autocast leaves turned ones in float32
    out = _layout.attend(*row, scaling or query.shape[-1] ** -0.5)
    return out.unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _layout is None else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
