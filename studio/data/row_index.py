"""Rows of a data file by number, without parsing the others: where each line begins, and the file in mapped memory."""

import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from studio.data.formats import Conversation
from studio.errors import DataError

BYTES_PER_LOOK = 4 * 2**20
ROWS_PER_LOOK = 100_000
HINT = "Build or import the dataset again."


class RowIndex:
    """The rows of a canonical JSONL file, counted from 1. A million rows take 8 MB and are never parsed at once.

    The file must not be changed in place; the studio's writers put a new one in its place.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file is not there or empty."""
        self._path = Path(path)
        try:
            with open(self._path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(f"The rows are gone: there is no {self._path.name}.", HINT) from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DataError(f"{self._path.name} cannot be read: {error}.", HINT) from None
        self._begins = _line_starts(self._bytes)

    def __len__(self) -> int:
        return len(self._begins)

    def row(self, number: int) -> Conversation:
        """Row `number`, from 1. Raises DataError when there is no such row, or it was damaged."""
        if not 1 <= number <= len(self):
            raise DataError(f"There is no row {number}.", f"The rows are 1 to {len(self):,}.")
        try:
            return Conversation.from_row(json.loads(self._line(number)))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"Row {number} of {self._path.name} is damaged: {error}.", "Import the file again."
            ) from None

    def __iter__(self) -> Iterator[Conversation]:
        return (self.row(number) for number in range(1, len(self) + 1))

    def rows(self, numbers: Sequence[int]) -> list[Conversation]:
        return [self.row(number) for number in numbers]

    def find(self, words: str) -> Iterator[int]:
        """Numbers of the rows whose text holds these words, the case of a to z ignored; all without words."""
        wanted = _as_in_the_file(words.strip())
        if not wanted:
            yield from range(1, len(self) + 1)
        for first in range(0, len(self) if wanted else 0, ROWS_PER_LOOK):
            yield from self._find_in(range(first, min(first + ROWS_PER_LOOK, len(self))), wanted)

    def _find_in(self, rows: range, wanted: bytes) -> Iterator[int]:
        """Look through neighbouring rows as one text; a line break cannot stand inside what is looked for."""
        offset = self._begins[rows.start]
        text = self._bytes[offset : self._end(rows.stop)].lower()
        place = text.find(wanted)
        while place >= 0:
            number = bisect_right(self._begins, offset + place, rows.start, rows.stop)
            if wanted in self._said_in(number):  # and not only in a key of the row
                yield number
            place = text.find(wanted, self._end(number) - offset)

    def _said_in(self, number: int) -> bytes:
        return b"\n".join(_as_in_the_file(message.content) for message in self.row(number).messages)

    def _line(self, number: int) -> bytes:
        return self._bytes[self._begins[number - 1] : self._end(number)]

    def _end(self, number: int) -> int:
        """Where row `number` ends."""
        return self._begins[number] if number < len(self) else len(self._bytes)


def _line_starts(content: mmap.mmap) -> "array[int]":
    """Where each line begins that is not empty."""
    import numpy  # a fifth of a second: only for who looks at rows

    whole = numpy.frombuffer(content, dtype=numpy.uint8)
    begins = [numpy.zeros(1, dtype=numpy.uint64)]
    for start in range(0, len(whole), BYTES_PER_LOOK):
        breaks = numpy.flatnonzero(whole[start : start + BYTES_PER_LOOK] == ord("\n"))
        begins.append((breaks + (start + 1)).astype(numpy.uint64))
    ends = numpy.append(numpy.concatenate(begins), numpy.uint64(len(content) + 1))
    filled = ends[:-1][numpy.diff(ends) > 1]
    return array("Q", filled.tobytes())


def _as_in_the_file(words: str) -> bytes:
    """Words as they stand inside a JSON string: quotes and line breaks are written with a backslash there."""
    return json.dumps(words, ensure_ascii=False)[1:-1].encode("utf-8", errors="replace").lower()
