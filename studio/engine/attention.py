"""Attention over a row of tokens that holds many examples: each blind to the others, what they share computed once.

Token i of a row sees j <= i where i < ends[j]: a prefix tree in depth-first order, or several one after another. On a
CPU the row is cut into blocks, each a few plain matrix products: for segments of some hundred tokens that is several
times faster than PyTorch's own kernel with a mask (benchmarks/attention.py). On CUDA the row is cut into chains for
kernels of sequences of different lengths, or runs with a mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from studio.data.packing import Ints

NAME = "retune"  # under which transformers finds this attention
BLOCK_TOKENS = 128  # best on CPUs, in bfloat16 and in float32
LONG_TOKENS = 1024  # a row's chain from here on: PyTorch's causal kernel beats blocks, and keeps less
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
KEPT_KEYS = 512  # keys a token, on average, up to which probabilities are kept for the backward pass

Range = tuple[int, int]


class Layout(Protocol):
    """Who sees whom in a row of tokens, ready to compute with: by `attend`, or by a kernel that takes the `mask`.

    `mask`: (1, 1, tokens, tokens), true where a token sees another.
    """

    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(tokens, heads, width) from a query (heads, tokens, width), key and value (key heads, tokens, width)."""


@dataclass(frozen=True)
class Block:
    """Tokens `start` to `end`. They see the ranges `before` whole, and of their own what `ends` leaves.

    `chain`: of their own each sees all up to itself.
    """

    start: int
    end: int
    before: tuple[Range, ...]
    chain: bool

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.before) + self.size

    @property
    def key_ranges(self) -> tuple[Range, ...]:
        """What its tokens may see, ranges that touch as one, their own last."""
        return _joined((*self.before, (self.start, self.end)))


def cut(ends: Ints, whole: int, chain: int, long_chain: int | None = None) -> Iterator[Block]:
    """Cut a row into blocks, each token in one: subtrees of up to `whole` tokens stay whole, chains have up to `chain`.

    A chain at a root with more than `long_chain` tokens is not cut.
    """
    branches = np.flatnonzero(ends[1:] != ends[:-1]) + 1  # tokens that are not the only child of the one before
    todo: list[tuple[int, int, tuple[Range, ...]]] = [(0, len(ends), ())]
    while todo:
        start, end, before = todo.pop()
        while start < end:
            if stop := _whole_subtrees(ends, start, end, whole):
                yield Block(start, stop, before, stop <= _chain_end(branches, start, stop))
                start = stop
                continue
            stop, close = _chain_end(branches, start, int(ends[start])), int(ends[start])
            if before or long_chain is None or stop - start <= long_chain:
                stop = min(stop, start + chain)
            yield Block(start, stop, before, True)
            if close < end:
                todo.append((close, end, before))
            start, end, before = stop, close, _joined((*before, (start, stop)))


def _whole_subtrees(ends: Ints, start: int, end: int, limit: int) -> int:
    """Where the subtrees that begin at `start` and fit into `limit` tokens together end; 0 when the first does not."""
    stop = 0
    at = start
    while at < end and ends[at] - start <= limit:
        stop = at = int(ends[at])
    return stop


def _chain_end(branches: Ints, start: int, end: int) -> int:
    """The first token after `start`, `end` at the latest, that begins something new."""
    place = int(np.searchsorted(branches, start, side="right"))
    return min(end, int(branches[place])) if place < len(branches) else end


def _joined(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def hidden_from(ends: Ints, start: int, end: int) -> Tensor:
    """(n, n), true where a token of the range does not see another one of it."""
    last, places = torch.from_numpy(ends[start:end]), torch.arange(start, end)
    return (places[:, None] < places) | (places[:, None] >= last)


class Blocks:
    """For a CPU: a few matrix products a block; long documents through PyTorch's causal kernel."""

    mask: Tensor | None = None

    def __init__(self, ends: Ints) -> None:
        found = list(cut(ends, BLOCK_TOKENS, BLOCK_TOKENS, LONG_TOKENS))
        self._long = [block for block in found if block.size > BLOCK_TOKENS]
        self._blocks = [block for block in found if block.size <= BLOCK_TOKENS]
        self._biases = [_bias(ends, block) for block in self._blocks]
        num_scores = sum(block.size * block.num_keys for block in self._blocks)
        self._keeps = num_scores <= KEPT_KEYS * sum(block.size for block in self._blocks)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out = _BlockAttention.apply(query, key, value, self._blocks, self._biases, scaling, self._keeps)
        if not self._long:
            return out
        return self._with_long(out, query, key, value, scaling)

    def _with_long(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Put in what the blocks left out."""
        pieces, at = [], 0
        for block in self._long:
            inside = [each[None, :, block.start : block.end] for each in (query, key, value)]
            long = functional.scaled_dot_product_attention(*inside, is_causal=True, scale=scaling, enable_gqa=True)
            pieces += [out[at : block.start], long[0].transpose(0, 1)]
            at = block.end
        return torch.cat([*pieces, out[at:]])


class Masked:
    """For whatever attention of transformers takes a mask."""

    def __init__(self, ends: Ints, device: torch.device) -> None:
        self.mask: Tensor | None = ~hidden_from(ends, 0, len(ends))[None, None].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        num_groups = query.shape[0] // key.shape[0]
        key, value = (each.repeat_interleave(num_groups, 0)[None] for each in (key, value))
        out = functional.scaled_dot_product_attention(query[None], key, value, attn_mask=self.mask, scale=scaling)
        return out[0].transpose(0, 1)


class Chains:
    """For kernels of sequences of different lengths: each chain of the tree is one, its keys led by its ancestors'.

    `kernel` gets query, key, value (tokens, heads, width), where queries and keys of a sequence begin and end, the
    longest of each, and the scaling; it is causal from a sequence's last key backwards.
    """

    mask: Tensor | None = None

    def __init__(self, ends: Ints, device: torch.device, kernel: Callable[..., Tensor]) -> None:
        blocks = sorted(cut(ends, 1, len(ends)), key=lambda block: block.start)
        keys = [np.arange(start, end) for block in blocks for start, end in (*block.before, (block.start, block.end))]
        self._places = torch.from_numpy(np.concatenate(keys)).to(device)
        self._shares = len(self._places) > len(ends)
        self._queries, self._longest_query = _borders([block.size for block in blocks], device)
        self._keys, self._longest_keys = _borders([block.num_keys for block in blocks], device)
        self._kernel = kernel

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        if self._shares:
            key, value = key.index_select(0, self._places), value.index_select(0, self._places)
        borders = (self._queries, self._keys, self._longest_query, self._longest_keys)
        return self._kernel(query.contiguous(), key.contiguous(), value.contiguous(), *borders, scaling)


def _borders(sizes: list[int], device: torch.device) -> tuple[Tensor, int]:
    """Where sequences of these sizes begin and end in one row, int32, and the largest size."""
    return torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)).to(device), max(sizes)


def _bias(ends: Ints, block: Block) -> Tensor:
    """What is added to the scores of a block's tokens among themselves: (n, n)."""
    hidden = hidden_from(ends, block.start, block.end)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


class _BlockAttention(torch.autograd.Function):
    """Blocks of a row, one after another. Heads that share a key are rows of one product.

    Scores are float32 whatever the numbers are: trained models look at some tokens with scores of hundreds, which
    bfloat16 would round by whole units.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: list[Block],
        biases: list[Tensor],
        scaling: float,
        keeps: bool,
    ) -> Tensor:
        num_heads, num_tokens, width = query.shape
        out = query.new_empty(num_tokens, num_heads, value.shape[-1])
        wide_query, wide_key = query.float() * scaling, key.float()
        kept = []
        for block, bias in zip(blocks, biases, strict=True):
            chances = _chances(_grouped(wide_query, block, key.shape[0]), _keys(wide_key, block), bias, value.dtype)
            mixed = torch.bmm(chances, _keys(value, block))
            out[block.start : block.end] = mixed.view(num_heads, block.size, -1).transpose(0, 1)
            if keeps:
                kept.append(chances)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.biases, ctx.scaling = blocks, biases, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for number, (block, bias) in enumerate(zip(ctx.blocks, ctx.biases, strict=True)):
            asked, keys, values = _grouped(query, block, key.shape[0]), _keys(key, block), _keys(value, block)
            if kept:
                chances = kept[number]
            else:
                chances = _chances(asked.float() * ctx.scaling, keys.float(), bias, value.dtype)
            wanted = _grouped(gradient.transpose(0, 1), block, key.shape[0])
            _spread(d_value, block, torch.bmm(chances.transpose(1, 2), wanted))
            d_chances = torch.bmm(wanted, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype).mul_(ctx.scaling)
            d_query[:, block.start : block.end] = torch.bmm(d_scores, keys).view(-1, block.size, query.shape[-1])
            _spread(d_key, block, torch.bmm(d_scores.transpose(1, 2), asked))
        return d_query, d_key, d_value, None, None, None, None


def _grouped(states: Tensor, block: Block, num_groups: int) -> Tensor:
    """(key heads, heads a key head * tokens, width) of a block's tokens."""
    inside = states[:, block.start : block.end]
    return inside.reshape(num_groups, -1, states.shape[-1])


def _keys(states: Tensor, block: Block) -> Tensor:
    """(key heads, keys, width) of what a block's tokens may see, their own last."""
    parts = [states[:, start:end] for start, end in block.key_ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _chances(asked: Tensor, keys: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(key heads, heads a key head * tokens, keys): how much each token takes of what it sees. Arguments: float32."""
    scores = torch.bmm(asked, keys.transpose(1, 2))
    own = scores.view(scores.shape[0], -1, len(bias), scores.shape[-1])[..., scores.shape[-1] - len(bias) :]
    own.add_(bias)
    return torch.softmax(scores, -1).to(dtype)


def _spread(total: Tensor, block: Block, parts: Tensor) -> None:
    """Add the keys' parts (key heads, keys, width) where the keys stand."""
    at = 0
    for start, end in block.key_ranges:
        total[:, start:end] += parts[:, at : at + end - start]
        at += end - start


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
        yield from _own_choices(name, dtype, device)
    if name == "eager":
        yield "eager", "as configured"
    elif name in ("auto", "sdpa", "blocks"):
        yield "sdpa", "as configured" if name == "sdpa" else "PyTorch's kernel with a mask, which any device has"


def _own_choices(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, str]]:
    if name == "flash_attention_2":
        yield "flash_attention_2", "as configured"
    if name == "blocks" or name == "auto" and device.type == "cpu":
        yield "blocks", "a CPU computes short segments fastest as plain matrix products"
    if name == "auto" and _has_varlen(dtype, device):
        yield "varlen", "PyTorch's kernel for sequences of different lengths needs no mask"


def _has_varlen(dtype: torch.dtype, device: torch.device) -> bool:
    """Its flash kernels compute 16-bit numbers on GPUs from compute capability 8.0."""
    return device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)


def make_layout(kind: str, ends: Ints, device: torch.device) -> Layout:
    """The layout of a row for a kind of attention."""
    if kind == "blocks":
        return Blocks(ends)
    if kind == "varlen":
        return Chains(ends, device, _varlen)
    return Chains(ends, device, _flash) if kind == "flash_attention_2" else Masked(ends, device)


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
    if dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("this attention has more to it than blocks compute")
    row = (each[0].to(value.dtype) for each in (query, key, value))  # autocast may leave rotated ones in float32
    out = _layout.attend(*row, scaling or query.shape[-1] ** -0.5)
    return out.unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _layout is None else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
