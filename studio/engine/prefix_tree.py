"""Prefix trees as tensors: examples that begin with the same tokens share the computation of that beginning.

The gradient stays the same. Chats of one dataset share their system prompt and often their question, tutorials repeat
one row, so a step computes a fraction of its tokens. `studio.data.packing` decides who shares a tree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from studio.data.packing import PrefixTree
from studio.data.tokens import Example
from studio.engine.batches import Batch, Place, blank, plan_place


def make_tree_batches(
    examples: Sequence[Example], max_length: int, micro_batch_size: int, pad_id: int, place: Place = (0, 1)
) -> list[Batch]:
    """The micro-batches of one step: trees of like size together, `micro_batch_size` at most."""
    plan = plan_place(examples, "tree", max_length, micro_batch_size, place)
    trees = [[tree_of([examples[index] for index in row]) for row in batch] for batch in plan]
    return [collate_trees(batch, pad_id) if batch else blank(pad_id) for batch in trees]


def tree_of(examples: Sequence[Example]) -> PrefixTree:
    """One tree of examples that come in alphabetical order of their ids."""
    tree = PrefixTree()
    for example in examples:
        tree.add(example.input_ids, example.labels)
    return tree


def collate_trees(trees: Sequence[PrefixTree], pad_id: int) -> Batch:
    """Trees as the rows of a batch, padded on the right; a mask only where a tree branches."""
    width = max(len(tree.tokens) for tree in trees)
    ids = torch.full((len(trees), width), pad_id)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    places, targets, weights = [], [], []
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        positions[row, : len(tree.tokens)] = torch.tensor(tree.depths)
        positions[row, len(tree.tokens) :] = torch.arange(len(tree.tokens), width)
        places += [row * width + node for node, _ in tree.weights]
        targets += [token for _, token in tree.weights]
        weights += tree.weights.values()
    return Batch(
        ids,
        positions,
        torch.tensor(places),
        torch.tensor(targets),
        torch.tensor(weights, dtype=torch.float32),
        sum(tree.num_tokens for tree in trees),
        None if all(tree.is_chain for tree in trees) else _mask(trees, width),
    )


def _mask(trees: Sequence[PrefixTree], width: int) -> Tensor:
    """(rows, 1, width, width), true where a node (third axis) sees itself or an ancestor (fourth axis)."""
    ends = torch.tensor([tree.ends() + list(range(len(tree.tokens) + 1, width + 1)) for tree in trees])
    nodes = torch.arange(width)
    causal = nodes[:, None] >= nodes[None, :]
    return (causal & (nodes[None, :, None] < ends[:, None, :])).unsqueeze(1)
