"""FlexAttention over a prefix tree: PyTorch's kernel that leaves out blocks of the score matrix which nobody sees.

A block of BLOCK x BLOCK scores is left out, computed whole, or computed with the mask. Which is known from the tree
alone, so the score matrix's mask is never made.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from studio.data.packing import Ints

BLOCK = 128  # what FlexAttention's kernels are made for
Kernel = Callable[..., Tensor]


class Flex:
    """Attends along a row. `kernel` is called as torch's `flex_attention`."""

    mask: Tensor | None = None

    def __init__(self, ends: Ints, device: torch.device, kernel: Kernel | None = None) -> None:
        made = [torch.from_numpy(ends), *_block_tensors(ends)]
        self.tensors = [each.to(device) for each in made]
        self._kernel = kernel or _compiled()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(tokens, heads, width) from a query (heads, tokens, width), key and value (key heads, tokens, width)."""
        row = (each[None].contiguous() for each in (query, key, value))
        out = self._kernel(*row, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)

    @property
    def block_mask(self) -> BlockMask:
        """Made of the tensors as they are now."""
        ends, *blocks = self.tensors

        def sees(batch: Tensor, head: Tensor, asking: Tensor, other: Tensor) -> Tensor:
            return (other <= asking) & (asking < ends[other])

        return BlockMask((len(ends), len(ends)), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def _block_tensors(ends: Ints) -> list[Tensor]:
    """How many blocks of keys each block of queries needs, and which, in the order of BlockMask's constructor:
    those with the mask, those computed whole, and both the other way round for the backward pass."""
    starts = np.arange(0, len(ends), BLOCK)
    last, first = np.maximum.reduceat(ends, starts), np.minimum.reduceat(ends, starts)
    queries, keys = starts[:, None], np.arange(len(starts))[None, :]
    before = keys < np.arange(len(starts))[:, None]
    whole = before & (first[None, :] >= queries + BLOCK)
    masked = ~whole & (before & (last[None, :] > queries) | (keys * BLOCK == queries))
    ordered = [_ordered(each) for each in (masked, whole, masked.T, whole.T)]
    return [tensor for pair in ordered for tensor in pair]


def _ordered(blocks: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) how many of each row are true, (1, 1, rows, columns) which, these first."""
    columns = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks.sum(1, dtype=np.int32))[None, None], torch.from_numpy(columns)[None, None]


@cache
def _compiled() -> Kernel:
    """Only compiled it is a kernel: as it is, it has the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
