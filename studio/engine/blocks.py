"""Attention on a CPU over a row of tokens that holds many examples: blocks of like size, a few matrix products for all.

A row is cut into blocks of tokens that see the same ones before them. Blocks are padded to the largest of their group
and computed together: two threads share one product of all better than one of each after another. Milliseconds by
length of the segments: benchmarks/results/attention.md.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from studio.data.packing import Ints
from studio.engine.cpu import compiled

BLOCK_TOKENS = 128  # best on CPUs, in bfloat16 and in float32
# Tokens that are one block, whatever they see: calls cost more there than scores that count for nothing.
SHORT_ROW = 256
LONG_TOKENS = 1024  # a row's chain from here on: PyTorch's causal kernel beats blocks, and keeps less
KEPT_KEYS = 512  # keys a token, on average, up to which probabilities are kept for the backward pass
PADDING = 1.5  # scores that a group computes for each one that counts, at most
GROUP_SCORES = 1 << 19  # of one head that a group has at once: bounds what stands beside the row

Range = tuple[int, int]


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
    """Attends along a row; documents of more than LONG_TOKENS go through PyTorch's causal kernel."""

    mask: Tensor | None = None
    tensors: tuple[Tensor, ...] = ()  # its blocks are of other shapes for every row

    def __init__(self, ends: Ints) -> None:
        whole = len(ends) if len(ends) <= SHORT_ROW else BLOCK_TOKENS
        found = list(cut(ends, whole, BLOCK_TOKENS, LONG_TOKENS))
        self._long = [block for block in found if block.size > max(whole, BLOCK_TOKENS)]
        short = [block for block in found if block.size <= max(whole, BLOCK_TOKENS)]
        self._plan = _Plan(ends, short) if short else None

    def compiled(self, num_heads: int, scaling: float, states: Tensor) -> tuple[Any, bool] | None:
        """What kernels.cpp computes a row of such states with, and whether it is to keep probabilities.

        None where it is not in use, or where a part of the row goes through PyTorch.
        """
        if self._long or self._plan is None:
            return None
        own = self._plan.compiled(num_heads, scaling, states)
        return None if own is None else (own, self._plan.keeps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(tokens, heads, width) from a query (heads, tokens, width), key and value (key heads, tokens, width)."""
        if not self._plan:
            nothing = value.new_empty(0, query.shape[0], value.shape[-1])
            return self._with_long(nothing, query, key, value, scaling)
        row = [each.transpose(0, 1) for each in (query, key, value)]
        out = _BlockAttention.apply(*row, self._plan, scaling)
        return self._with_long(out, query, key, value, scaling) if self._long else out

    def _with_long(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Put in what the blocks left out."""
        pieces, at = [], 0
        for block in self._long:
            inside = [each[None, :, block.start : block.end] for each in (query, key, value)]
            long = functional.scaled_dot_product_attention(*inside, is_causal=True, scale=scaling, enable_gqa=True)
            pieces += [out[at : block.start], long[0].transpose(0, 1)]
            at = block.end
        return torch.cat([*pieces, out[at:]])


@dataclass(frozen=True)
class _Group:
    """Blocks that are computed as one, padded to `size` tokens and `num_keys` keys each.

    `tokens` (blocks, size) and `keys` (blocks, num_keys) say which of the row; `bias` (blocks, size, 1, num_keys) is
    added to the scores: -inf where a token does not see a key. Padding repeats a token, and sees all.
    """

    tokens: Ints
    keys: Ints
    bias: Tensor
    padding: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.tokens.shape, self.keys.shape[1])


class _Plan:
    """The groups of a row, and where each token's result stands among theirs."""

    def __init__(self, ends: Ints, blocks: Sequence[Block]) -> None:
        self.groups = [_group(ends, each) for each in _alike(blocks)]
        self.num_tokens = len(ends)
        scores = sum(block.size * block.num_keys for block in blocks)
        self.keeps = scores <= KEPT_KEYS * sum(block.size for block in blocks)
        tokens = np.concatenate([group.tokens.ravel() for group in self.groups])
        real = ~np.concatenate([group.padding.numpy().ravel() for group in self.groups])
        slots = np.zeros(len(ends), dtype=np.int64)
        slots[tokens[real]] = np.flatnonzero(real)
        self._slots, self._elsewhere = slots, np.setdiff1d(np.arange(len(ends)), tokens[real])
        self._places: dict[int, _Places] = {}
        self._compiled: dict[tuple[int, float], Any] = {}

    def compiled(self, num_heads: int, scaling: float, states: Tensor) -> Any:
        """The groups as kernels.cpp takes them, for such states; None where it is not in use."""
        if not compiled.takes(states):
            return None
        if (num_heads, scaling) not in self._compiled:
            places = self.places(num_heads)
            elsewhere = torch.empty(0, dtype=torch.int64) if places.elsewhere is None else places.elsewhere
            biases, paddings = [each.bias for each in self.groups], [each.padding for each in self.groups]
            rows = (places.tokens, places.keys, biases, paddings, places.results, elsewhere)
            self._compiled[num_heads, scaling] = compiled.now.Blocks(*rows, num_heads, scaling)
        return self._compiled[num_heads, scaling]

    def places(self, num_heads: int) -> "_Places":
        """Indices into rows of (tokens * key heads), made once."""
        if num_heads not in self._places:
            self._places[num_heads] = _Places(
                tokens=[_of_heads(group.tokens, num_heads) for group in self.groups],
                keys=[_of_heads(group.keys, num_heads) for group in self.groups],
                results=self._results(num_heads),
                elsewhere=_of_heads(self._elsewhere, num_heads) if len(self._elsewhere) else None,
            )
        return self._places[num_heads]

    def _results(self, num_heads: int) -> Tensor:
        """For each (token, key head) its row among the groups' results, which have a group's heads one by one."""
        sizes = [group.tokens.size for group in self.groups]
        starts = np.cumsum([0, *sizes])
        group = np.searchsorted(starts, self._slots, "right") - 1
        inside, size = self._slots - starts[group], np.array(sizes)[group]
        heads = np.arange(num_heads)
        rows = starts[group][:, None] * num_heads + heads * size[:, None] + inside[:, None]
        return torch.from_numpy(rows.ravel())


@dataclass(frozen=True)
class _Places:
    """Rows of states (tokens * key heads, numbers): a group's tokens and keys, where results stand, who has none."""

    tokens: list[Tensor]
    keys: list[Tensor]
    results: Tensor
    elsewhere: Tensor | None


def _of_heads(tokens: Ints, num_heads: int) -> Tensor:
    """Rows of the tokens for each key head in turn, where a row of states has a token's heads side by side."""
    return torch.from_numpy((tokens.ravel() * num_heads + np.arange(num_heads)[:, None]).ravel())


def _alike(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks in groups that waste little by padding, those with most keys first."""
    group: list[Block] = []
    for block in sorted(blocks, key=lambda block: (-block.num_keys, -block.size, block.start)):
        wider = [*group, block]
        size, num_keys = max(each.size for each in wider), wider[0].num_keys
        area = len(wider) * size * num_keys
        if group and (area > PADDING * sum(each.size * each.num_keys for each in wider) or area > GROUP_SCORES):
            yield group
            wider = [block]
        group = wider
    yield group


def _group(ends: Ints, blocks: Sequence[Block]) -> _Group:
    size, num_keys = max(block.size for block in blocks), max(block.num_keys for block in blocks)
    tokens = np.repeat([[block.start] for block in blocks], size, 1)
    keys = np.repeat([[block.start] for block in blocks], num_keys, 1)
    bias, padding = torch.zeros(len(blocks), size, 1, num_keys), torch.ones(len(blocks), size, dtype=torch.bool)
    for number, block in enumerate(blocks):
        tokens[number, : block.size] = np.arange(block.start, block.end)
        keys[number, : block.num_keys] = np.concatenate([np.arange(*each) for each in block.key_ranges])
        own = bias[number, : block.size, 0, block.num_keys - block.size : block.num_keys]
        own.masked_fill_(hidden_from(ends, block.start, block.end), -torch.inf)
        bias[number, :, 0, block.num_keys :] = -torch.inf
        padding[number, : block.size] = False
    return _Group(tokens, keys, bias, padding)


class _BlockAttention(torch.autograd.Function):
    """Group after group. Heads that share a key are rows of one product.

    Scores are float32 whatever the numbers are: trained models look at some tokens with scores of hundreds, which
    bfloat16 would round by whole units.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, scaling: float) -> Tensor:
        """All (tokens, heads, width); keys and values may have fewer heads."""
        ctx.plan, ctx.scaling, num_heads = plan, scaling, key.shape[1]
        ctx.compiled = plan.compiled(num_heads, scaling, value)
        if ctx.compiled is not None:
            out, *kept = ctx.compiled.forward(query, key, value, plan.keeps)
            ctx.save_for_backward(query, key, value, *kept)
            return out
        places, rows = plan.places(num_heads), [_rows(each, num_heads) for each in (query, key, value)]
        results, kept = [], []
        for group, tokens, keys in zip(plan.groups, places.tokens, places.keys, strict=True):
            asked, offered, values = _taken(rows, group, tokens, keys, num_heads)
            chances = _chances(asked, offered, group.bias, scaling)
            results.append(torch.bmm(chances, values).view(len(tokens), -1))
            if plan.keeps:
                kept.append(chances)
        ctx.save_for_backward(query, key, value, *kept)
        return _joined_rows(results).index_select(0, places.results).view(*query.shape[:2], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        if ctx.compiled is not None:
            return *ctx.compiled.backward(gradient, query, key, value, kept), None, None
        plan, num_heads = ctx.plan, key.shape[1]
        places, rows = plan.places(num_heads), [_rows(each, num_heads) for each in (query, key, value)]
        wide, d_queries = _rows(gradient, num_heads), []
        d_key, d_value = (torch.zeros(each.shape, dtype=torch.float32) for each in rows[1:])
        for number, (group, tokens, keys) in enumerate(zip(plan.groups, places.tokens, places.keys, strict=True)):
            asked, offered, values = _taken(rows, group, tokens, keys, num_heads)
            chances = kept[number] if kept else _chances(asked, offered, group.bias, ctx.scaling)
            wanted = wide.index_select(0, tokens).view(num_heads, *group.padding.shape, -1)
            wanted = wanted.masked_fill_(group.padding[None, :, :, None], 0).view(*asked.shape[:2], -1)
            _add_rows(d_value, keys, torch.bmm(chances.transpose(1, 2), wanted))
            d_chances = torch.bmm(wanted, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype).mul_(ctx.scaling)
            d_queries.append(torch.bmm(d_scores, offered).view(len(tokens), -1))
            _add_rows(d_key, keys, torch.bmm(d_scores.transpose(1, 2), asked))
        d_query = _joined_rows(d_queries).index_select(0, places.results)
        if places.elsewhere is not None:
            d_query.index_fill_(0, places.elsewhere, 0)
        narrow = (each.to(value.dtype).view(value.shape[0], num_heads, -1) for each in (d_key, d_value))
        return d_query.view(query.shape), *narrow, None, None


def _rows(states: Tensor, num_heads: int) -> Tensor:
    """(tokens * key heads, numbers) of states (tokens, heads, width): heads that share a key in one row."""
    return states.reshape(states.shape[0] * num_heads, -1)


def _taken(
    rows: Sequence[Tensor], group: _Group, tokens: Tensor, keys: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (key heads * blocks, size * heads a key head, width), key and value (key heads * blocks, keys, width)."""
    num_blocks, size, num_keys = group.shape
    query, key, value = rows
    asked = query.index_select(0, tokens).view(num_heads * num_blocks, -1, key.shape[-1])
    offered = (each.index_select(0, keys).view(num_heads * num_blocks, num_keys, -1) for each in (key, value))
    return asked, *offered


def _chances(asked: Tensor, offered: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """(key heads * blocks, size * heads a key head, keys): how much each token takes of what it sees."""
    with _exact_products(asked.dtype):
        scores = torch.bmm(asked.float(), offered.float().transpose(1, 2))
    shaped = scores.view(-1, *bias.shape[:2], scores.shape[1] // bias.shape[1], scores.shape[2])
    torch.add(bias, shaped, alpha=scaling, out=shaped)
    return torch.softmax(scores, -1, dtype=torch.float32).to(asked.dtype)


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Products of bfloat16 numbers, held as float32, in the units for bfloat16: the sums are float32 all the same."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _joined_rows(results: list[Tensor]) -> Tensor:
    return results[0] if len(results) == 1 else torch.cat(results)


def _add_rows(total: Tensor, rows: Tensor, parts: Tensor) -> None:
    """Add the keys' parts where the keys stand, in float32: a shared beginning gets one from every block."""
    total.index_add_(0, rows, parts.reshape(len(rows), -1).float())
