"""From a project's datasets to the tensors of a step: tokenised once, split, mixed, packed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from studio.config.schema import DataSection, RunConfig
from studio.data import mix
from studio.data.cache import TokenCache
from studio.data.named import Template
from studio.data.packing import Ints, MicroBatch, PrefixTree, filler, grow_tree, packing_report, plan_rank, plan_step
from studio.data.split import split
from studio.data.tokens import IGNORE_INDEX, Example, TextTokenizer
from studio.engine.attention import Layout
from studio.engine.tokenize import Versions, stored_sources, tokenise
from studio.errors import DataError

REPORT_STEPS = 16
Place = tuple[int, int]  # a process's rank, and how many processes there are


@dataclass(frozen=True)
class Corpus:
    """Examples by source, those kept out of training, and the sha256 of each source's file.

    Those that are trained stay on the disk until a step takes them.
    """

    train: Mapping[str, Sequence[Example]]
    valid: list[Example]
    fingerprints: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(examples) for name, examples in self.train.items()}


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `places` are flat positions (row * width + column) whose next token is trained: `targets`.

    input_ids and position_ids: (rows, width). `weights` says for how many examples a target counts. `num_tokens` are
    those of the examples, each as often as it comes, without padding. With a `layout` there is one row, and it says
    who sees whom; without, positions restart with every example, and transformers keeps packed ones apart by that.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    num_tokens: int
    layout: Layout | None = None

    @property
    def num_trained_tokens(self) -> int:
        return int(self.weights.sum())

    @property
    def tensors(self) -> list[Tensor]:
        """All that a pass over the batch reads; those of a row of a fixed size have a fixed shape."""
        own = [self.input_ids, self.position_ids, self.places, self.targets, self.weights]
        return [*own, *(self.layout.tensors if self.layout else ())]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; layouts are made where they are used. From pinned memory the copy does not wait."""
        if device.type == "cpu":
            return self
        tensors = (self.input_ids, self.position_ids, self.places, self.targets, self.weights)
        moved = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
        return Batch(*moved, self.num_tokens, self.layout)


def load_corpus(
    folder: Path,
    config: RunConfig,
    template: Template,
    tokenizer: TextTokenizer,
    progress: Callable[[int, int], None] = lambda current, total: None,
    versions: Versions | None = None,
) -> Corpus:
    """The config's sources of the project in `folder`, tokenised (or found in its cache) and split.

    `versions` are those that the run began with: edits since then do not reach it. `progress` gets rows done and rows
    in all. Rows without a trained token are left out, with a line in the log.
    Raises DataError when a source is not there, a row cannot be tokenised, or no row of a source can be used.
    """
    sources = stored_sources(folder, config.data, versions)
    train: dict[str, Sequence[Example]] = {}
    valid: list[Example] = []
    fingerprints = {}
    for name, tokens in tokenise(folder, config.data, sources, template, tokenizer, progress):
        _require_usable(tokens, name, config.data)
        train[name], kept_out = split(tokens, name, config.data.valid_share, config.train.seed)
        valid += kept_out
        fingerprints[name] = tokens.info.recipe["content"]
    return Corpus(train, valid, fingerprints)


def examples_from(corpus: Corpus, config: RunConfig, position: int) -> Iterator[list[Example]]:
    """The examples of each step from row `position` of the mixture on, without end."""
    rows = mix.iterate(corpus.sizes, config.data.sources, config.train.seed, start=position)
    while True:
        chosen = islice(rows, config.examples_per_step)
        yield [corpus.train[source][row] for source, row in chosen]


def describe_packing(corpus: Corpus, config: RunConfig, pack: str, num_steps: int) -> str:
    """What packing saves, in words, measured on the plan of the first steps."""
    num_steps = min(num_steps, REPORT_STEPS)
    examples = [each for step in islice(examples_from(corpus, config, 0), num_steps) for each in step]
    sizes = (config.examples_per_step, pack, config.data.max_length, config.train.micro_batch_size)
    report = packing_report(examples, range(len(examples)), *sizes)
    return (
        f"packing {pack}: the first {num_steps} steps have {report.num_tokens} tokens in {report.num_examples} rows, "
        f"the longest {report.longest}, {report.truncations} cut; {report.padding_saved:.0%} less padding than row by "
        f"row, {report.prefix_saved:.0%} of the tokens shared"
    )


def make_batches(
    examples: Sequence[Example], pack: str, max_length: int, micro_batch_size: int, pad_id: int, place: Place = (0, 1)
) -> list[Batch]:
    """The micro-batches of one step: one example (pack "none") or several (pack "sequence") a row, padded."""
    plan = plan_place(examples, pack, max_length, micro_batch_size, place)
    rows = [[[examples[index] for index in sequence] for sequence in batch] for batch in plan]
    return [collate(batch, pad_id) if batch else blank(pad_id) for batch in rows]


def make_rows(
    examples: Sequence[Example],
    pack: str,
    max_length: int,
    micro_batch_size: int,
    layout: Callable[[Ints], Layout],
    most_tokens: int | None = None,
    place: Place = (0, 1),
    room: Callable[[int], int] | None = None,
) -> list[Batch]:
    """The micro-batches of one step, each a single row without padding; `layout` is made from a row's `ends`.

    Lines of a micro-batch follow one another; they become several rows when they have more than `most_tokens` tokens
    together. Without that limit a process has as many rows as any other. Rows are filled up to the sizes that `room`
    gives.
    """
    batches = []
    for lines in plan_place(examples, pack, max_length, micro_batch_size, place):
        trees = [_trees([examples[index] for index in line], pack) for line in lines]
        rows = [[*row, filler(row, room)] if room else row for row in _rows_of(trees, most_tokens)]
        batches += [join(row, layout) for row in rows] or [blank(0)]
    return batches


def plan_place(
    examples: Sequence[Example], pack: str, max_length: int, micro_batch_size: int, place: Place
) -> list[MicroBatch]:
    """The part of a step's micro-batches that falls to a process: as many as to any other, some perhaps empty."""
    plan = plan_step(examples, pack, max_length, micro_batch_size, num_ranks=place[1])
    return plan_rank(plan, *place, lambda row: sum(len(examples[index].input_ids) for index in row))


def blank(pad_id: int) -> Batch:
    """A batch that counts for nothing, for a process that has no rows while others have: they compute in step."""
    nothing = torch.zeros(1, dtype=torch.long)
    return Batch(torch.full((1, 1), pad_id), nothing[None], nothing, nothing, torch.zeros(1), 0)


def join(trees: Sequence[PrefixTree], layout: Callable[[Ints], Layout]) -> Batch:
    """Trees one after another in one row."""
    starts = np.cumsum([0, *(len(tree) for tree in trees[:-1])])
    joined = {
        name: torch.from_numpy(np.concatenate([getattr(tree, name) for tree in trees]))
        for name in ("tokens", "depths", "targets", "weights")
    }
    shifted = {
        name: np.concatenate([getattr(tree, name) + start for tree, start in zip(trees, starts, strict=True)])
        for name in ("places", "ends")
    }
    return Batch(
        joined["tokens"][None],
        joined["depths"][None],
        torch.from_numpy(shifted["places"]),
        joined["targets"],
        joined["weights"].float(),
        sum(tree.num_tokens for tree in trees),
        layout(shifted["ends"]),
    )


def _trees(line: Sequence[Example], pack: str) -> list[PrefixTree]:
    return [grow_tree(line)] if pack == "tree" else [grow_tree([example]) for example in line]


def _rows_of(lines: Sequence[list[PrefixTree]], most_tokens: int | None) -> Iterator[list[PrefixTree]]:
    """Lines joined while they have at most `most_tokens` tokens together; a longer one stays alone."""
    row: list[PrefixTree] = []
    for line in lines:
        if row and most_tokens is not None and sum(map(len, [*row, *line])) > most_tokens:
            yield row
            row = []
        row = [*row, *line]
    if row:
        yield row


def collate(sequences: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Lay out sequences, each of one or more examples, as the rows of a batch, padded on the right.

    Padding needs no mask: nothing trained comes after it, and attention looks back only.
    """
    width = max(sum(len(example.input_ids) for example in sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    positions = torch.zeros(len(sequences), width, dtype=torch.long)
    places: list[int] = []
    targets: list[int] = []
    num_tokens = 0
    for row, sequence in enumerate(sequences):
        start = 0
        for example in sequence:
            end = start + len(example.input_ids)
            ids[row, start:end] = torch.tensor(example.input_ids)
            positions[row, start:end] = torch.arange(end - start)
            for offset, label in enumerate(example.labels[1:]):
                if label != IGNORE_INDEX:
                    places.append(row * width + start + offset)
                    targets.append(label)
            start = end
        num_tokens += start
        positions[row, start:] = torch.arange(width - start)
    return Batch(ids, positions, torch.tensor(places), torch.tensor(targets), torch.ones(len(targets)), num_tokens)


def _require_usable(tokens: TokenCache, name: str, data: DataSection) -> None:
    """A line in the log for rows that are left out and for those that were cut."""
    info = tokens.info
    if num_cut := int(tokens.files.truncated()[tokens.files.trained_tokens() > 0].sum()):
        print(f"{name}: {num_cut} of {info.num_rows} rows are longer than {data.max_length} tokens and were cut.")
    if dropped := tokens.untrained():
        shown = ", ".join(map(str, dropped[:10])) + (", …" if len(dropped) > 10 else "")
        print(f"{name}: {len(dropped)} of {info.num_rows} rows left out, nothing in them is trained: row {shown}.")
    if not tokens.trainable():
        raise DataError(
            f"No row of dataset {name!r} has a token to train on ({info.num_rows} rows looked at).",
            "Check data.loss_on and data.max_length, and look at the rows on the Data page.",
        )
