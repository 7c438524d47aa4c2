"""Where a row of a dataset is trained: its step, its line in the batch, and whom it shares that line with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from studio import datasets
from studio.config.schema import RunConfig
from studio.data import mix
from studio.data.cache import TokenCache, open_or_build
from studio.data.named import load_template
from studio.data.packing import num_shared, plan_step
from studio.data.split import split
from studio.data.token_files import StoredRows
from studio.data.tokens import Example, TextTokenizer
from studio.errors import DataError
from studio.models import require
from studio.projects import Project

TRAINED, KEPT_OUT, LEFT_OUT = "trained", "kept out", "left out"


@dataclass(frozen=True)
class Neighbour:
    """An example of the same line of a batch: source and row (from 1; 0 for joined documents), and its tokens."""

    source: str
    row: int
    num_tokens: int


@dataclass(frozen=True)
class RowPlace:
    """`use`: TRAINED, KEPT_OUT (it measures valid/loss) or LEFT_OUT (nothing in it is trained).

    For a trained row: the first step that sees it, counted from 1, the micro-batch and the line in it, both counted
    from 1, what fills that line in order, which of it is the row, and the tokens that it shares with another there.
    """

    use: str
    step: int = 0
    micro_batch: int = 0
    line: int = 0
    neighbours: tuple[Neighbour, ...] = ()
    own: int = 0
    num_shared: int = 0


def place_of(project: Project, config: RunConfig, name: str, row: int) -> RowPlace:
    """The place of row `row` (from 1) in the plan that the trainer makes of this config.

    Tokenises the config's datasets when that was not done yet. Raises DataError when the config does not train the
    dataset, one of its datasets is not there, or the row is none of its own.
    """
    if name not in config.data.sources:
        raise DataError(f"The config {config.name!r} does not train on {name!r}.", "Choose another, or add the source.")
    caches = dict(_tokens(project, config))
    own = np.flatnonzero(caches[name].files.numbers == row)
    if not len(own):
        raise DataError(f"Dataset {name!r} has no row {row} of its own.", "A document is joined with those around it.")
    if not caches[name].files.trained_tokens()[own[0]]:
        return RowPlace(LEFT_OUT)
    parts = {each: split(tokens, each, config.data.valid_share, config.train.seed) for each, tokens in caches.items()}
    train = {each: part[0] for each, part in parts.items()}
    index = np.flatnonzero(train[name].rows == own[0])
    return _planned(config, train, (name, int(index[0]))) if len(index) else RowPlace(KEPT_OUT)


def _tokens(project: Project, config: RunConfig) -> Iterator[tuple[str, TokenCache]]:
    folder, data = require(config.model.base), config.data
    template, tokenizer = load_template(data.template, folder), TextTokenizer.load(folder)
    for name in data.sources:
        path = project.path(datasets.get(project, name).path)
        yield name, open_or_build(project.folder, name, path, template, tokenizer, data.max_length, data.loss_on)


def _planned(config: RunConfig, train: Mapping[str, StoredRows], wanted: tuple[str, int]) -> RowPlace:
    sizes = {name: len(rows) for name, rows in train.items()}
    order = mix.iterate(sizes, config.data.sources, config.train.seed)
    first = next(place for place, each in enumerate(order) if each == wanted) // config.examples_per_step
    begin = first * config.examples_per_step
    order = mix.iterate(sizes, config.data.sources, config.train.seed, start=begin)
    chosen = list(islice(order, config.examples_per_step))
    examples = [train[name][index] for name, index in chosen]
    plan = plan_step(examples, config.data.pack, config.data.max_length, config.train.micro_batch_size)
    own = chosen.index(wanted)
    batch, line = next(
        (batch, line) for batch, lines in enumerate(plan) for line, members in enumerate(lines) if own in members
    )
    members = plan[batch][line]
    neighbours = tuple(_neighbour(train, *chosen[each], examples[each]) for each in members)
    shared = _shared(examples, members, own) if config.data.pack == "tree" else 0
    return RowPlace(TRAINED, first + 1, batch + 1, line + 1, neighbours, members.index(own), shared)


def _neighbour(train: Mapping[str, StoredRows], source: str, index: int, example: Example) -> Neighbour:
    rows = train[source]
    return Neighbour(source, int(rows.files.numbers[rows.rows[index]]), len(example.input_ids))


def _shared(examples: list[Example], members: list[int], own: int) -> int:
    """Tokens at the beginning that are computed once for this example and another one of its line."""
    others = (examples[each].input_ids for each in members if each != own)
    return max((num_shared(examples[own].input_ids, other) for other in others), default=0)
