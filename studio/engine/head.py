"""Output head and cross-entropy over the positions that are trained, so few at a time that full logits never exist.

Where the head is frozen, its part of the gradient is formed in the forward pass: two products instead of three, and
no logits are kept.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from studio.engine.cpu import compiled

HEAD_ROWS = 256  # positions that go through the head at once: bounds the memory of the logits
CACHED_NUMBERS = 1 << 18  # float32 logits that are worked on while they are in a core's cache


def is_frozen_linear(head: nn.Module | None) -> bool:
    """Whether `frozen_head_gradient` can stand for the head: a plain matrix that does not learn."""
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over targets, each as often as it has weight, in float32. logits: (targets, vocabulary)."""
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), targets, reduction="none") @ weights


@torch.no_grad()
def frozen_head_gradient(states: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (a float32 number) and its gradient at `states`: both (targets, hidden size). `weights`: float32."""
    weight, gradient = head.weight.to(states.dtype), torch.empty_like(states)
    losses = []
    for start in range(0, len(states), HEAD_ROWS):
        piece = slice(start, start + HEAD_ROWS)
        logits = functional.linear(states[piece], weight, head.bias)
        losses.append(_to_gradient(logits, targets[piece], weights[piece]))
        torch.mm(logits, weight, out=gradient[piece])
    return torch.stack(losses).sum(), gradient


def _to_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Turn logits into the gradient of their weighted cross-entropy, in place; returns its sum."""
    if compiled.takes(logits):
        return torch.ops.retune.cross_entropy_gradient(logits, targets, weights)
    total = weights.new_zeros(())
    rows = max(1, CACHED_NUMBERS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        piece = slice(start, start + rows)
        chances = torch.log_softmax(logits[piece].float(), -1)
        picked = targets[piece, None]
        total -= (chances.gather(1, picked)[:, 0] * weights[piece]).sum()  # no product, which autocast would narrow
        chances.exp_().scatter_add_(1, picked, chances.new_full(picked.shape, -1.0)).mul_(weights[piece, None])
        logits[piece] = chances
    return total
