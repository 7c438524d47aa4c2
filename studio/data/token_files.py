"""Examples on disk: plain numpy files that are written in one pass and read through memory maps.

ids.bin (uint16 or uint32, by vocabulary), trained.bin (one bit a token), examples.npy (end, trained tokens, cut),
rows.npy: for each row of training its example (rows that repeat share one) and its number in the dataset, from 1; 0
for a sequence of joined documents. Chats come first, in the dataset's order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from studio.data.tokens import IGNORE_INDEX, Example
from studio.errors import DataError

IDS, TRAINED, EXAMPLES, ROWS = "ids.bin", "trained.bin", "examples.npy", "rows.npy"
FILES = (IDS, TRAINED, EXAMPLES, ROWS)
EXAMPLE = np.dtype([("end", "<i8"), ("trained", "<u4"), ("truncated", "?")])
ROW = np.dtype([("example", "<u4"), ("number", "<u4")])
FLUSH_TOKENS = 1 << 18


def id_type(largest_id: int) -> str:
    """The narrowest type that holds every id."""
    return "<u2" if largest_id < 1 << 16 else "<u4"


@dataclass(frozen=True)
class Block:
    """Some examples as arrays: for each its tokens and whether it was cut, for each token its id and whether it is
    trained."""

    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Block":
        lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
        num_tokens = int(lengths.sum())
        ids = _joined([example.input_ids for example in examples], num_tokens)
        labels = _joined([example.labels for example in examples], num_tokens)
        trained = labels != IGNORE_INDEX
        if not np.array_equal(labels[trained], ids[trained]):
            raise DataError("An example has a label that is neither its token nor left out.", "Report this as a bug.")
        truncated = np.array([example.truncated for example in examples], dtype=bool)
        return cls(lengths, truncated, ids.astype(np.uint32), trained)

    def arrays(self) -> list[NDArray[Any]]:
        """In the order in which a block is made of them."""
        return [self.lengths, self.truncated, self.ids, self.trained]

    def id_lists(self) -> Iterator[list[int]]:
        """The ids of each example."""
        ends = np.cumsum(self.lengths)
        return (self.ids[end - length : end].tolist() for end, length in zip(ends, self.lengths, strict=True))


class TokenWriter:
    """Appends examples; keeps a piece of the tokens and 13 bytes an example in memory."""

    def __init__(self, folder: Path, largest_id: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, id_type(largest_id)
        self._ids: BinaryIO = open(folder / IDS, "wb")
        self._bits: BinaryIO = open(folder / TRAINED, "wb")
        self._table = bytearray()
        self._pending: list[Example] = []
        self._num_pending = 0
        self._rest = np.zeros(0, dtype=bool)  # trained tokens that do not fill a byte yet
        self._end = self._num_examples = 0

    def add(self, example: Example) -> int:
        """Append an example; returns its number, from 0."""
        self._pending.append(example)
        self._num_pending += len(example.input_ids)
        number = self._num_examples + len(self._pending) - 1
        if self._num_pending >= FLUSH_TOKENS:
            self._flush()
        return number

    def add_block(self, block: Block) -> int:
        """Append the examples of a block; returns the number of the first one."""
        self._flush()
        first, num_tokens = self._num_examples, len(block.ids)
        table = np.zeros(len(block.lengths), dtype=EXAMPLE)
        ends = np.cumsum(block.lengths)
        table["end"], table["truncated"] = ends + self._end, block.truncated
        table["trained"] = _counts(block.trained, ends - block.lengths, ends)
        self._table += table.tobytes()
        self._ids.write(block.ids.astype(self.dtype).tobytes())
        bits = np.concatenate([self._rest, block.trained])
        whole = len(bits) - len(bits) % 8
        self._bits.write(np.packbits(bits[:whole]).tobytes())
        self._rest, self._end = bits[whole:], self._end + num_tokens
        self._num_examples += len(block.lengths)
        return first

    def close(self, examples: Sequence[int] | NDArray[Any], numbers: Sequence[int] | NDArray[Any]) -> None:
        """Finish; for each row of training, its example and its number in the dataset."""
        self._flush()
        self._bits.write(np.packbits(self._rest).tobytes())
        self.abandon()
        rows = np.zeros(len(examples), dtype=ROW)
        rows["example"], rows["number"] = examples, numbers
        np.save(self.folder / EXAMPLES, np.frombuffer(bytes(self._table), dtype=EXAMPLE))
        np.save(self.folder / ROWS, rows)

    def abandon(self) -> None:
        """Close the files as they are."""
        self._ids.close()
        self._bits.close()

    def _flush(self) -> None:
        pending, self._pending, self._num_pending = self._pending, [], 0
        if pending:
            self.add_block(Block.of(pending))


class TokenFiles:
    """Examples of a folder, by row (from 0) or by their own number; nothing is read before it is asked for."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self._ids = _mapped(folder / IDS, dtype)
        self._bits = _mapped(folder / TRAINED, "u1")
        self._examples = np.load(folder / EXAMPLES, mmap_mode="r")
        rows = np.load(folder / ROWS, mmap_mode="r")
        self._rows, self.numbers = rows["example"], rows["number"]

    @property
    def num_rows(self) -> int:
        """Rows of training."""
        return len(self._rows)

    @property
    def num_examples(self) -> int:
        """Different rows."""
        return len(self._examples)

    def row(self, row: int) -> Example:
        """The example of a row, counted from 0."""
        number = int(self._rows[row])
        start = int(self._examples["end"][number - 1]) if number else 0
        end = int(self._examples["end"][number])
        ids = self._ids[start:end]
        bits = np.unpackbits(self._bits[start // 8 : -(-end // 8)])[start % 8 :][: end - start]
        labels = np.where(bits, ids.astype(np.int64), IGNORE_INDEX)
        return Example(ids.tolist(), labels.tolist(), bool(self._examples["truncated"][number]))

    def example_numbers(self, rows: NDArray[Any]) -> NDArray[np.uint32]:
        """For each of these rows, the number of its example: equal rows have the same."""
        return np.asarray(self._rows[rows])

    def ends(self) -> NDArray[np.int64]:
        """For each example, the place in the file behind its last token."""
        return np.asarray(self._examples["end"])

    def tokens(self, start: int, end: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """(ids, whether each is trained) of the tokens between two places in the file."""
        bits = np.unpackbits(self._bits[start // 8 : -(-end // 8)])[start % 8 :][: end - start]
        return np.asarray(self._ids[start:end], dtype=np.uint32), bits.astype(bool)

    def ids_at(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The ids at these places in the file."""
        return np.asarray(self._ids[places])

    def trained_tokens(self) -> NDArray[np.uint32]:
        """For each row, the tokens that a model can be asked for."""
        return np.asarray(self._examples["trained"])[self._rows]

    def truncated(self) -> NDArray[np.bool_]:
        """For each row, whether it was cut."""
        return np.asarray(self._examples["truncated"])[self._rows]

    def lengths(self) -> NDArray[np.int64]:
        """For each row, its tokens."""
        return np.diff(self._examples["end"], prepend=0)[self._rows]


class StoredRows(Sequence[Example]):
    """Some rows of token files as a sequence of examples, each made when it is asked for."""

    def __init__(self, files: TokenFiles, rows: NDArray[Any]) -> None:
        self.files = files
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...
    def __getitem__(self, index: int | slice) -> "Example | StoredRows":
        if isinstance(index, slice):
            return StoredRows(self.files, self.rows[index])
        return self.files.row(int(self.rows[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self.files.row(int(row)) for row in self.rows)

    def __eq__(self, other: object) -> bool:
        """Equal examples in the same order."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _joined(lists: list[list[int]], num_items: int) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=num_items)


def _counts(trained: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Trained tokens of each example but for its first token, which nothing stands before."""
    total = np.concatenate([[0], np.cumsum(trained)])
    return total[ends] - total[np.minimum(starts + 1, ends)]


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.zeros(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r")
