"""The rows of an import as its source had them, found again from what they became: by content, so edits lose nothing.

rows.z holds them as JSON lines [number, line, file, value], some hundred at a time packed; blocks.npy where each pack
begins; links.npy, sorted, for each row the mark of the conversation that it became. Any row is read in milliseconds.
"""

import hashlib
import uuid
import zlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from studio.data.conversation import Conversation, canonical_json, canonical_line
from studio.data.rows import MAX_ROW_BYTES, RawRow
from studio.errors import DataError
from studio.paths import atomic_path

FOLDER = "data/raw"
ROWS, BLOCKS, LINKS = "rows.z", "blocks.npy", "links.npy"
BLOCK_ROWS, BLOCK_BYTES = 256, 2**20
MARK_BYTES = 8
MOST_FOUND = 5
SHOWN_CHARACTERS = 2_000
SHOWN_ITEMS = 100
MORE = "… and {number} characters more"
HINT = "Import the source again to see its raw rows."


@dataclass(frozen=True)
class RawFound:
    """The first raw rows that became a conversation, and how many did: equal rows become one and the same."""

    rows: tuple[RawRow, ...] = ()
    num_rows: int = 0


def raw_folder(name: str) -> str:
    """A place in the project for the raw rows of one import of a dataset."""
    return f"{FOLDER}/{name}/{uuid.uuid4().hex[:12]}"


class RawWriter:
    """Keeps raw rows; a few bytes of each stay in memory. Packing runs beside the import."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = open(folder / ROWS, "wb")
        self._marks, self._begins, self._firsts = bytearray(), array("Q"), array("Q")
        self._pending: list[bytes] = []
        self._num_bytes = self._num_rows = 0
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="raw-rows")
        self._packed: Future[bytes] | None = None

    def add(self, raw: RawRow, conversation: Conversation) -> None:
        """The row that became this conversation."""
        line = _as_json([raw.number, raw.line, raw.file, raw.value])
        self._pending.append(line)
        self._num_bytes += len(line)
        self._marks += _mark(conversation)
        self._num_rows += 1
        if len(self._pending) == BLOCK_ROWS or self._num_bytes > BLOCK_BYTES:
            self._pack()

    def close(self) -> None:
        import numpy as np  # a fifth of a second: only for who imports

        self._pack()
        self._write_packed()
        self.abandon()
        marks = np.frombuffer(bytes(self._marks), dtype="<u8")
        links = np.zeros(len(marks), dtype=[("mark", "<u8"), ("row", "<u4")])
        order = np.argsort(marks, kind="stable")
        links["mark"], links["row"] = marks[order], order
        np.save(self._folder / LINKS, links)
        blocks = np.array([self._begins, self._firsts], dtype="<u8").T if self._begins else np.zeros((0, 2), "<u8")
        np.save(self._folder / BLOCKS, blocks)

    def abandon(self) -> None:
        """Close the file as it is."""
        self._packer.shutdown()
        self._file.close()

    def _pack(self) -> None:
        self._write_packed()
        if self._pending:
            self._firsts.append(self._num_rows - len(self._pending))
            self._packed = self._packer.submit(_packed, self._pending)
        self._pending, self._num_bytes = [], 0

    def _write_packed(self) -> None:
        if self._packed is not None:
            self._begins.append(self._file.tell())
            self._file.write(self._packed.result())
            self._packed = None


def keep_rows(folder: Path, converted: Iterable[tuple[RawRow, Conversation]]) -> Iterator[Conversation]:
    """The conversations, whose raw rows are in `folder` when the last one was taken. Nothing is left when it fails."""
    with atomic_path(folder) as temporary:
        writer = RawWriter(temporary)
        try:
            for raw, conversation in converted:
                writer.add(raw, conversation)
                yield conversation
            writer.close()
        finally:
            writer.abandon()


class RawRows:
    """The raw rows in a folder. Raises DataError when they are not there or damaged."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self._folder = folder
        try:
            self._links = np.load(folder / LINKS, mmap_mode="r")
            self._blocks = np.load(folder / BLOCKS)
        except (OSError, ValueError) as error:
            raise DataError(f"The raw rows cannot be read: {error}.", HINT) from None

    def find(self, conversation: Conversation, most: int = MOST_FOUND) -> RawFound:
        """The raw rows that became this conversation; none for one that was edited since."""
        import numpy as np

        mark = np.frombuffer(_mark(conversation), dtype="<u8")[0]
        first = int(np.searchsorted(self._links["mark"], mark, "left"))
        end = int(np.searchsorted(self._links["mark"], mark, "right"))
        numbers = [int(row) for row in self._links["row"][first : min(end, first + most)]]
        return RawFound(tuple(self._row(number) for number in numbers), end - first)

    def _row(self, number: int) -> RawRow:
        import numpy as np

        try:
            block = int(np.searchsorted(self._blocks[:, 1], number, "right")) - 1
            begin = int(self._blocks[block, 0])
            end = int(self._blocks[block + 1, 0]) if block + 1 < len(self._blocks) else None
            with open(self._folder / ROWS, "rb") as file:
                file.seek(begin)
                packed = file.read() if end is None else file.read(end - begin)
            text = zlib.decompressobj().decompress(packed, 2 * MAX_ROW_BYTES)
            line = text.splitlines()[number - int(self._blocks[block, 1])]
            place = orjson.loads(line)
            return RawRow(place[0], place[1], place[3], file=place[2])
        except (OSError, ValueError, IndexError, zlib.error) as error:
            raise DataError(f"The raw row cannot be read: {error}.", HINT) from None


def shortened_cells(value: Any, more: str = MORE, depth: int = 0) -> Any:
    """The value with long texts and lists cut, each with a note of how much is left out."""
    if isinstance(value, str):
        left = len(value) - SHOWN_CHARACTERS
        return value if left <= 0 else value[:SHOWN_CHARACTERS] + more.format(number=f"{left:,}")
    if isinstance(value, dict):
        items = list(value.items())
        cut = {key[:SHOWN_CHARACTERS]: shortened_cells(each, more, depth + 1) for key, each in items[:SHOWN_ITEMS]}
        return cut | ({"…": len(items) - SHOWN_ITEMS} if len(items) > SHOWN_ITEMS else {})
    if isinstance(value, list):
        cut_list = [shortened_cells(each, more, depth + 1) for each in value[:SHOWN_ITEMS]]
        return cut_list + ([f"… {len(value) - SHOWN_ITEMS:,}"] if len(value) > SHOWN_ITEMS else [])
    return value


def _mark(conversation: Conversation) -> bytes:
    return hashlib.blake2b(canonical_line(conversation), digest_size=MARK_BYTES).digest()


def _as_json(value: Any) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer beyond 64 bits
        return canonical_json(value).encode("utf-8") + b"\n"


def _packed(lines: list[bytes]) -> bytes:
    return zlib.compress(b"".join(lines), 1)
