"""Attention over a row of tokens that holds many examples: each blind to the others, what they share computed once.

Token i of a row sees j <= i where i < ends[j]: a prefix tree in depth-first order, or several one after another. On a
CPU the row is cut into blocks for plain matrix products (blocks.py), on CUDA into chains for kernels of sequences of
different lengths; elsewhere it runs with a mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from studio.data.packing import Ints
from studio.engine.blocks import Blocks, cut, hidden_from

NAME = "retune"  # under which transformers finds this attention
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


class Layout(Protocol):
    """Who sees whom in a row of tokens, ready to compute with: by `attend`, or by a kernel that takes the `mask`.

    `mask`: (1, 1, tokens, tokens), true where a token sees another.
    """

    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(tokens, heads, width) from a query (heads, tokens, width), key and value (key heads, tokens, width)."""


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
