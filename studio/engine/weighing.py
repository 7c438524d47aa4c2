"""Does a file hold the weights that it should? Every tensor read back and held against what was to be written.

Answers alone cannot tell: what 8 bits move the logits of the starter by (5 %) is more than what weights 2 % too large
do, or a small adapter that was left out. Rounding has no direction, damage has one: over the many weights of a tensor
rounding hardly moves the file's share of a given direction, and that is what is measured here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Root mean square of a tensor's difference over that of the tensor. Half a unit in the last place for floating point;
# else twice what even steps make of normally distributed weights, whose blocks of 16 to 32 reach to about 2.1
# deviations on either side: steps of 1/127, 1/32, 2/31 and 2/15 of that, over the square root of 12.
# (No block of 32 can reach farther than the root of 32 of its own deviations: q8_0 stays below 1.3e-2 for any weights.)
ALLOWED = {
    "f32": 1e-6, "f16": 1e-3, "bf16": 4e-3, "q8_0": 2e-2, "q6_k": 4e-2, "q5_k_m": 8e-2, "q4_k_m": 1.7e-1,
}  # fmt: skip
SCALE = 0.01
SHARE = 0.5
TINY = 1e-4
"""Tensors of smaller numbers than this, which 16 bits can lose whole, count as if they were of this size."""


@dataclass(frozen=True)
class Read:
    """A tensor of a file, what it should be, and the base's where an adapter changes it."""

    name: str
    found: Tensor
    wanted: Tensor
    before: Tensor | None = None


@dataclass(frozen=True)
class Weighed:
    """`error` and `scale` are those of the worst tensors: the relative difference, and by what the file multiplies.

    `adapter_share`: how much of what the adapter changes is in the file, 1 for all; None without an adapter. Below a
    half, more of it was lost than kept: to a mistake, or to a number format that is too coarse for so small a change.
    """

    num_tensors: int
    error: float
    allowed: float
    error_of: str
    scale: float
    scale_of: str
    scales_hold: bool
    adapter_share: float | None

    @property
    def passed(self) -> bool:
        shared = self.adapter_share is None or abs(self.adapter_share - 1) <= SHARE
        return self.error <= self.allowed and self.scales_hold and shared

    @property
    def message(self) -> str:
        """The finding in one clause."""
        parts = [f"weights differ by {self.error:.2g} (allowed {self.allowed:.2g})"]
        if not self.scales_hold:
            parts.append(f"{self.scale_of} is scaled by {self.scale:.3g}")
        if self.adapter_share is not None:
            parts.append(f"{self.adapter_share:.0%} of the adapter's change is in the file")
        return ", ".join(parts)

    def figures(self) -> dict[str, Any]:
        return {
            "num_tensors": self.num_tensors, "error": self.error, "allowed": self.allowed, "error_of": self.error_of,
            "scale": self.scale, "scale_of": self.scale_of, "adapter_share": self.adapter_share,
        }  # fmt: skip


def weigh(tensors: Iterable[Read], allowed: float) -> Weighed:
    """Weigh all tensors of a file, one in memory at a time. A difference that is NaN counts as infinite."""
    errors, scales, holds = {}, {}, True
    along = length = 0.0
    for each in tensors:
        found, wanted = each.found.float(), each.wanted.float()
        errors[each.name], scales[each.name] = _error(found, wanted), _scale(found, wanted)
        holds &= 1 - SCALE - errors[each.name] ** 2 <= scales[each.name] <= 1 + SCALE
        if each.before is not None:
            change = wanted - each.before.float()
            along, length = along + _dot(found - each.before.float(), change), length + _dot(change, change)
    worst = max(errors, key=errors.__getitem__)
    bent = max(scales, key=lambda name: abs(scales[name] - 1))
    share = along / length if length else None
    return Weighed(len(errors), errors[worst], allowed, worst, scales[bent], bent, holds, share)


def _error(found: Tensor, wanted: Tensor) -> float:
    error = _dot(found - wanted, found - wanted) / _size(wanted)
    return math.sqrt(error) if math.isfinite(error) else math.inf


def _scale(found: Tensor, wanted: Tensor) -> float:
    """What the tensor is multiplied with; coarse steps that fit best shrink it by the square of their error."""
    scale = 1 + _dot(found - wanted, wanted) / _size(wanted)
    return scale if math.isfinite(scale) else math.inf


def _size(wanted: Tensor) -> float:
    return max(_dot(wanted, wanted), wanted.numel() * TINY**2)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))
