"""How much a run computes at once, counted on its data: what `studio.estimate` is asked about."""

from collections.abc import Mapping, Sequence
from itertools import islice

from studio.config.schema import VIRTUAL_METHODS, RunConfig
from studio.data import mix
from studio.data.packing import plan_step, row_tokens
from studio.data.tokens import IGNORE_INDEX, Example
from studio.estimate import Basis, Load, make_load
from studio.machine import Device

COUNTED_STEPS = 32
ALIKE = 0.9  # micro-batches whose smallest has at least this share of the largest one's tokens are about alike


def counted(config: RunConfig, train: Mapping[str, Sequence[Example]], on: Device, basis: Basis = "counted") -> Load:
    """The largest micro-batch of the first COUNTED_STEPS steps; `train`: the rows that are trained, by source, or such
    as stand for them."""
    pack = "none" if config.method in VIRTUAL_METHODS else config.data.pack
    data, sizes = config.data, {name: len(rows) for name, rows in train.items()}
    order = mix.iterate(sizes, data.sources, config.train.seed)
    lines: list[int] = []
    batches: set[int] = set()
    longest = trained = tokens = 0
    for _ in range(COUNTED_STEPS):
        examples = [train[name][row] for name, row in islice(order, config.examples_per_step)]
        tokens += sum(len(example.input_ids) for example in examples)
        longest = max(longest, *(len(example.input_ids) for example in examples))
        for batch in plan_step(examples, pack, data.max_length, config.train.micro_batch_size):
            own = [row_tokens(examples, row, pack) for row in batch]
            lines = max(lines, own, key=sum)
            batches.add(sum(own))
            trained = max(trained, sum(_num_trained(examples[index]) for row in batch for index in row))
    varies = min(batches) < ALIKE * max(batches)
    return make_load(config, on, lines, longest, trained, tokens / COUNTED_STEPS, basis, varies)


def _num_trained(example: Example) -> int:
    return sum(label != IGNORE_INDEX for label in example.labels[1:])
