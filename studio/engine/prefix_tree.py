"""Examples that begin with the same tokens share the computation of that beginning; the gradient stays the same.

Tokens are nodes of a tree, a node's position is its depth, and it attends to its ancestors. An edge from a node to a
next token carries the number of examples that are trained there: its weight in the loss. Chats of one dataset share
their system prompt and often their question, tutorials repeat one row, so a step computes a fraction of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from studio.data.tokens import IGNORE_INDEX, Example
from studio.engine.batches import Batch


@dataclass
class PrefixTree:
    """Examples are added in alphabetical order of their ids, so the descendants of a node follow it without a gap.

    `weights` counts the examples that train a token after a node.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    weights: dict[tuple[int, int], int] = field(default_factory=dict)
    num_tokens: int = 0  # of all examples, shared ones counted every time
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, example: Example) -> None:
        self.num_tokens += len(example.input_ids)
        node = -1
        for depth, token in enumerate(needed_ids(example)):
            if depth and example.labels[depth] != IGNORE_INDEX:
                self._train(node, token)
            node = self._child(node, token, depth)
        self._train(node, example.labels[len(needed_ids(example))])

    def ends(self) -> list[int]:
        """For each node, the first one after it that is not its descendant."""
        ends = list(range(1, len(self.tokens) + 1))
        for node in range(len(self.tokens) - 1, 0, -1):
            if self.parents[node] >= 0:
                ends[self.parents[node]] = max(ends[self.parents[node]], ends[node])
        return ends

    @property
    def is_chain(self) -> bool:
        """Whether no node branches: a single example, or one that repeats."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def _train(self, node: int, token: int) -> None:
        self.weights[node, token] = self.weights.get((node, token), 0) + 1

    def _child(self, node: int, token: int, depth: int) -> int:
        found = self._children.get((node, token))
        if found is None:
            found = self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(depth)
        return found


def needed_ids(example: Example) -> list[int]:
    """The ids up to the one that predicts the last trained token; what follows changes nothing."""
    last = max(index for index, label in enumerate(example.labels) if index and label != IGNORE_INDEX)
    return example.input_ids[:last]


def plan_trees(examples: Sequence[Example], capacity: int) -> list[list[int]]:
    """Indices of the examples in groups whose trees have at most `capacity` nodes (or hold a single example).

    In alphabetical order neighbours share most, and what a new example shares with a tree it shares with its
    predecessor.
    """
    ids = [needed_ids(example) for example in examples]
    groups: list[list[int]] = []
    size = 0
    for index in sorted(range(len(ids)), key=lambda index: (ids[index], index)):
        new = len(ids[index]) - (_num_shared(ids[groups[-1][-1]], ids[index]) if groups else 0)
        if groups and size + new <= capacity:
            groups[-1].append(index)
            size += new
        else:
            groups.append([index])
            size = len(ids[index])
    return groups


def make_tree_batches(examples: Sequence[Example], capacity: int, micro_batch_size: int, pad_id: int) -> list[Batch]:
    """The micro-batches of one step: trees of like size together, `micro_batch_size` at most."""
    trees = []
    for group in plan_trees(examples, capacity):
        tree = PrefixTree()
        for index in group:
            tree.add(examples[index])
        trees.append(tree)
    trees.sort(key=lambda tree: -len(tree.tokens))
    starts = range(0, len(trees), micro_batch_size)
    return [collate_trees(trees[start : start + micro_batch_size], pad_id) for start in starts]


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


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
