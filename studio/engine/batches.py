"""From a project's datasets to the tensors of a step: tokenised once, split, mixed, packed."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from studio.config.schema import DataSection, RunConfig
from studio.data import mix
from studio.data.formats import Conversation, read_conversations
from studio.data.packing import plan_step
from studio.data.template import ChatTemplate
from studio.data.tokens import IGNORE_INDEX, Example, TextTokenizer, encode_conversation
from studio.errors import DataError
from studio.paths import inside, sha256_of
from studio.store import datasets, open_db


@dataclass(frozen=True)
class Corpus:
    """Examples by source, those kept out of training, and the sha256 of each source's file."""

    train: dict[str, list[Example]]
    valid: list[Example]
    fingerprints: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(examples) for name, examples in self.train.items()}


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `places` are flat positions (row * width + column) whose next token is trained: `targets`.

    input_ids and position_ids: (rows, width). `weights` says for how many examples a target counts. Without a mask,
    positions restart with every example, and transformers keeps packed examples apart by that; with one (rows, 1,
    width, width) a position sees what it says. `num_tokens` are those of the examples, without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    num_tokens: int
    mask: Tensor | None = None

    @property
    def num_trained_tokens(self) -> int:
        return int(self.weights.sum())

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.input_ids, self.position_ids, self.places, self.targets, self.weights)
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(*moved, self.num_tokens, self.mask.to(device) if self.mask is not None else None)


def load_corpus(
    folder: Path,
    config: RunConfig,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    progress: Callable[[int, int], None] = lambda current, total: None,
) -> Corpus:
    """Read, tokenise and split the config's sources of the project in `folder`.

    `progress` gets rows done and rows in all. Rows without a trained token are left out, with a line in the log.
    Raises DataError when a source is not there or no row of it can be used.
    """
    files = _files(folder, config.data)
    rows = {name: read_conversations(path) for name, path in files.items()}
    total = sum(len(conversations) for conversations in rows.values())
    train, valid, done = {}, [], 0
    for name, conversations in rows.items():
        examples = []
        for example in _encode(conversations, config.data, template, tokenizer, name):
            examples.append(example)
            done += 1
            progress(done, total)
        usable = _usable(examples, name, config.data)
        kept_out = _valid_rows(len(usable), config.data.valid_share, config.train.seed, name)
        train[name] = [example for row, example in enumerate(usable) if row not in kept_out]
        valid += [usable[row] for row in sorted(kept_out)]
    return Corpus(train, valid, {name: sha256_of(path) for name, path in files.items()})


def examples_from(corpus: Corpus, config: RunConfig, position: int) -> Iterator[list[Example]]:
    """The examples of each step from row `position` of the mixture on, without end."""
    rows = mix.iterate(corpus.sizes, config.data.sources, config.train.seed, start=position)
    while True:
        chosen = islice(rows, config.examples_per_step)
        yield [corpus.train[source][row] for source, row in chosen]


def make_batches(
    examples: Sequence[Example], pack: str, max_length: int, micro_batch_size: int, pad_id: int
) -> list[Batch]:
    """The micro-batches of one step: one example (pack "none") or several (pack "sequence") a row."""
    plan = plan_step(examples, pack, max_length, micro_batch_size)
    return [collate([[examples[index] for index in sequence] for sequence in batch], pad_id) for batch in plan]


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


def _files(folder: Path, data: DataSection) -> dict[str, Path]:
    with open_db(folder) as db:
        paths = {name: inside(folder, datasets.get(db, name).path) for name in data.sources}
    for name, path in paths.items():
        if not path.is_file():
            raise DataError(f"The file of dataset {name!r} is gone ({path.name}).", "Build or import it again.")
    return paths


def _encode(
    conversations: Sequence[Conversation],
    data: DataSection,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    name: str,
) -> Iterator[Example]:
    """Examples in order of rows; rows that repeat (tutorials repeat one thousands of times) are encoded once."""
    known: dict[tuple[object, ...], Example] = {}
    for number, conversation in enumerate(conversations, start=1):
        example = known.get(conversation.messages)
        if example is None:
            try:
                example = encode_conversation(conversation, template, tokenizer, data.max_length, data.loss_on)
            except DataError as error:
                raise DataError(f"Dataset {name!r}, row {number}: {error.message}", error.hint) from error
            known[conversation.messages] = example
        yield example


def _usable(examples: list[Example], name: str, data: DataSection) -> list[Example]:
    usable = [example for example in examples if example.num_trained_tokens]
    if num_cut := sum(example.truncated for example in usable):
        print(f"{name}: {num_cut} of {len(examples)} rows are longer than {data.max_length} tokens and were cut.")
    if dropped := [str(row) for row, each in enumerate(examples, start=1) if not each.num_trained_tokens]:
        shown = ", ".join(dropped[:10]) + (", …" if len(dropped) > 10 else "")
        print(f"{name}: {len(dropped)} of {len(examples)} rows left out, nothing in them is trained: row {shown}.")
    if not usable:
        raise DataError(
            f"No row of dataset {name!r} has a token to train on ({len(examples)} rows looked at).",
            "Check data.loss_on and data.max_length, and look at the rows on the Data page.",
        )
    return usable


def _valid_rows(num_rows: int, share: float, seed: int, name: str) -> frozenset[int]:
    """Rows that are kept out of training."""
    wanted = mix.num_valid_rows(num_rows, share)
    return frozenset(random.Random(f"{seed}-{name}-valid").sample(range(num_rows), wanted))
