"""Some rows of a stored dataset as tokens, before all of them are: enough to say how long its rows are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

from studio.data.conversation import Conversation
from studio.data.formats import convert_rows
from studio.data.rows import RawRow, parse
from studio.data.tokens import Example
from studio.errors import DataError
from studio.store import dataset_versions
from studio.store.checks import Tokens

MOST_ROWS, FEWEST_ROWS = 256, 16
MOST_TEXT_BYTES = 2**20  # tokenised in about half a second
BEGINNING_BYTES = 32 * 2**20  # of a large file no more is read


@dataclass(frozen=True)
class DrawnRows(Sequence[Example]):
    """A dataset of `num_rows` rows, each shown as the nearest of the `examples` that were drawn evenly from them."""

    examples: tuple[Example, ...]
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self.num_rows))]
        return self.examples[index * len(self.examples) // self.num_rows]


def draw(folder: Path, name: str, fingerprint: str, num_rows: int, tokens: Tokens) -> DrawnRows:
    """Rows of dataset `name` of the project in `folder`, as a run's tokens; remembered by its `fingerprint`.

    Rows that cannot be tokenised, or of which nothing is trained, are passed over. Raises DataError where none is left,
    for raw text (whose rows are joined), and for rows too long to look at; ModelError without the base.
    """
    examples = _examples(folder, name, fingerprint, tokens)
    if not examples:
        raise DataError(f"The rows of {name!r} cannot be drawn from.", "Tokenise them all.")
    return DrawnRows(examples, num_rows)


@lru_cache(maxsize=16)
def _examples(folder: Path, name: str, fingerprint: str, tokens: Tokens) -> tuple[Example, ...]:
    """Those of `draw`; none where they cannot be drawn from, which is remembered, too: pages ask again and again."""
    lines = _drawn_lines(dataset_versions.rows_file(folder, name, digest=fingerprint))
    rows = (RawRow(number, None, *parse(line)) for number, line in enumerate(lines, start=1))
    conversations = [each for _, each in convert_rows(rows, "messages") if isinstance(each, Conversation)]
    encoded = tokens.encoder().encode(conversations)
    examples = tuple(each for each in encoded if isinstance(each, Example) and each.num_trained_tokens)
    return () if any(each.is_document for each in examples) else examples


def _drawn_lines(path: Path) -> list[bytes]:
    """Lines in even distances, as many as their length allows; of a large file from its beginning. None where a few
    would be too much to look at."""
    with open(path, "rb") as file:
        beginning = file.read(BEGINNING_BYTES)
        is_whole = not file.read(1)
    lines = beginning.split(b"\n")
    lines = [line for line in (lines if is_whole else lines[:-1]) if line]
    number = min(len(lines), MOST_ROWS, MOST_TEXT_BYTES * len(lines) // max(1, len(beginning)))
    if number < min(len(lines), FEWEST_ROWS):
        return []
    return [lines[place * len(lines) // number] for place in range(number)]
