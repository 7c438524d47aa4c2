"""Datasets tokenised once: kept in the project under a key of everything that shapes the ids, so never stale.

A changed row, template, tokenizer, length or rule of loss gives another key; what is damaged is built again.
"""

import hashlib
import json
import platform
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from numpy.typing import NDArray

from studio.data.encoding import EncodedLines, Work, encode_batches, num_workers_for
from studio.data.named import Template, writes_date
from studio.data.pretrain import sequences
from studio.data.token_files import FILES, StoredRows, TokenFiles, TokenWriter
from studio.data.tokens import Example, TextTokenizer
from studio.errors import DataError
from studio.paths import atomic_path, atomic_write_json, folder_bytes, inside, remove, require_free_space, sha256_of

FOLDER = "cache"
META = "meta.json"
MAX_KNOWN_ROWS = 100_000  # different rows that are remembered to recognise their repetition
PROGRESS_ROWS = 256
BATCH_ROWS, BATCH_BYTES = 1024, 2**20  # what is encoded together; the same however many do it
NO_EXAMPLE = -1
DOCUMENT = b'"text"'  # stands in every line that is a document, and in few others
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the tokens of a dataset; `content` is the sha256 of its file."""

    content: str
    template: str
    tokenizer: str
    max_length: int
    loss_on: str
    code: str

    @property
    def key(self) -> str:
        """Name of the cache's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode("ascii")).hexdigest()[:32]


@dataclass(frozen=True)
class CacheInfo:
    """One cache: of which dataset, how large, and what lint wants to know.

    `num_rows` of the dataset, of which `num_documents` are raw text, joined and split into `num_sequences`. Tokens are
    counted as often as they are trained; `num_distinct` examples are stored. `num_truncated`: rows that were cut;
    `num_untrained`: rows in which nothing is trained. A damaged cache has a size and nothing else.
    """

    key: str
    dataset: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    num_rows: int = 0
    num_documents: int = 0
    num_sequences: int = 0
    num_distinct: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_truncated: int = 0
    num_untrained: int = 0
    longest: int = 0
    created_at: str = ""
    files: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True)
class TokenCache:
    """An open cache."""

    info: CacheInfo
    files: TokenFiles

    def rows(self) -> StoredRows:
        """All rows of training: chats in the dataset's order, then sequences of joined documents."""
        return StoredRows(self.files, np.arange(self.files.num_rows))

    def trainable(self) -> StoredRows:
        """Those of `rows` with a trained token."""
        return StoredRows(self.files, np.flatnonzero(self.files.trained_tokens()))

    def untrained(self) -> list[int]:
        """Numbers, from 1, of the dataset's rows in which nothing is trained."""
        numbers = self.files.numbers[self.files.trained_tokens() == 0]
        return [int(number) for number in numbers[numbers > 0]]


def open_or_build(
    root: Path,
    name: str,
    source: Path,
    template: Template,
    tokenizer: TextTokenizer,
    max_length: int,
    loss_on: str,
    progress: Progress = lambda num_rows: None,
) -> TokenCache:
    """The tokens of the canonical data file `source` of dataset `name`, from the cache of the project in `root`.

    They are built when they are not there, in bounded memory; `progress` gets the rows read so far. Raises DataError
    that names the dataset and the row when one cannot be tokenised, DiskFullError.
    """
    recipe = recipe_for(source, template, tokenizer, max_length, loss_on)
    folder = root / FOLDER / recipe.key
    found = _opened(folder)
    if found is None:
        require_free_space(root, source.stat().st_size, f"the tokens of {name!r}")
        _build(folder, name, recipe, source, template, tokenizer, progress)
        found = _opened(folder)
    if found is None:
        raise DataError(f"What was just written of {name!r} reads back differently.", "Check the disk and try again.")
    progress(found.info.num_rows)
    return found


def recipe_for(source: Path, template: Template, tokenizer: TextTokenizer, max_length: int, loss_on: str) -> Recipe:
    """What `open_or_build` makes of a file; a template that writes the day's date is another one every day."""
    looks = template.fingerprint
    if writes_date(template):
        looks += f" {date.today().isoformat()}"
    return Recipe(sha256_of(source), looks, tokenizer.fingerprint, max_length, loss_on, code_fingerprint())


@cache
def code_fingerprint() -> str:
    """sha256 of the code between a row and its ids: this folder's, and the versions of the libraries that it calls."""
    versions = [tokenizers.__version__, jinja2.__version__, platform.python_version()]
    digest = hashlib.sha256(json.dumps(versions).encode("ascii"))
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def listed(root: Path) -> list[CacheInfo]:
    """The caches of the project in `root`, newest first; a damaged one too, with its size."""
    folders = [path for path in (root / FOLDER).glob("*") if path.is_dir() and not path.name.startswith(".")]
    found = [replace(_read_info(path) or CacheInfo(path.name), num_bytes=folder_bytes(path)) for path in folders]
    return sorted(found, key=lambda info: (info.created_at, info.key), reverse=True)


def delete(root: Path, key: str) -> None:
    """Delete one cache; a run that has it open goes on. It is built again when it is needed."""
    folder = inside(root / FOLDER, key)
    if folder.parent != (root / FOLDER).resolve() or not folder.is_dir():
        raise DataError(f"There is no token cache {key!r}.", "Look at the list again; it may have been deleted before.")
    remove(folder)


def delete_all(root: Path) -> int:
    """Delete every cache of a project; returns the bytes that became free."""
    num_bytes = sum(info.num_bytes for info in listed(root))
    remove(root / FOLDER)
    return num_bytes


def _opened(folder: Path) -> TokenCache | None:
    """The cache in a folder, every file compared with its sha256; None when there is none or it is damaged."""
    if not folder.is_dir():
        return None
    info = _read_info(folder)
    if info is None or any(not _is_intact(folder / name, info.files.get(name, "")) for name in FILES):
        print(f"The tokens in {FOLDER}/{folder.name} are damaged and are built again.", flush=True)
        return None
    return TokenCache(info, TokenFiles(folder, info.dtype))


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _read_info(folder: Path) -> CacheInfo | None:
    try:
        return CacheInfo(**json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing, no JSON, other fields: as good as not there
        return None


def _build(
    folder: Path,
    name: str,
    recipe: Recipe,
    source: Path,
    template: Template,
    tokenizer: TextTokenizer,
    progress: Progress,
) -> None:
    rows = _DistinctRows(source, name, progress)
    work = Work(template, tokenizer, recipe.max_length, recipe.loss_on)
    results = encode_batches(rows.batches(), work, num_workers_for(source.stat().st_size))
    with atomic_path(folder) as temporary, closing(results):
        writer = TokenWriter(temporary, tokenizer.largest_id)
        joined = array("I")  # numbers of the examples
        try:
            for ids in sequences(_documents(rows, results, writer), recipe.max_length):
                joined.append(writer.add(Example(ids, ids)))
            chats, numbers = rows.chats()
            writer.close(np.concatenate([chats, joined]), np.concatenate([numbers, np.zeros(len(joined))]))
        finally:
            writer.abandon()
        info = _described(TokenFiles(temporary, writer.dtype), rows.num_read, len(chats))
        info = replace(info, key=folder.name, dataset=name, recipe=asdict(recipe), dtype=writer.dtype)
        atomic_write_json(temporary / META, asdict(info))


def _documents(rows: "_DistinctRows", results: Iterable[EncodedLines], writer: TokenWriter) -> Iterator[list[int]]:
    """Write the chats, and yield the ids of raw text, which is joined first."""
    for result in map(rows.sound, results):
        rows.take(result.is_document, writer.add_block(result.chats))
        yield from result.documents.id_lists()


def _described(files: TokenFiles, num_rows: int, num_chats: int) -> CacheInfo:
    trained, lengths = files.trained_tokens(), files.lengths()
    return CacheInfo(
        key="",
        num_rows=num_rows,
        num_documents=num_rows - num_chats,
        num_sequences=files.num_rows - num_chats,
        num_distinct=files.num_examples,
        num_tokens=int(lengths.sum()),
        num_trained_tokens=int(trained.sum(dtype=np.int64)),
        num_truncated=int(files.truncated().sum()),
        num_untrained=int((trained[:num_chats] == 0).sum()),
        longest=int(lengths.max(initial=0)),
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        files={each: sha256_of(files.folder / each) for each in FILES},
    )


class _DistinctRows:
    """The different lines of a canonical data file once each, and which of them every row is.

    Documents come as often as they are there: they are trained as one text.
    """

    def __init__(self, source: Path, name: str, progress: Progress) -> None:
        self.num_read = 0
        self._lines_of_rows = array("I")  # for each row, which of the different lines it is
        self._examples = array("q")  # for each of these, its example, NO_EXAMPLE for a document
        self._on_the_way: deque[array[int]] = deque()  # numbers of the rows of batches that have not come back
        self._source, self._name, self._progress = source, name, progress

    def batches(self) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        numbers, num_bytes, num_lines = array("I"), 0, 0
        known: dict[bytes, int] = {}
        for line in self._lines():
            mark = hashlib.blake2b(line, digest_size=16).digest()
            place = known.get(mark)
            if place is None:
                place, num_lines = num_lines, num_lines + 1
                if len(known) < MAX_KNOWN_ROWS and DOCUMENT not in line:
                    known[mark] = place
                batch.append(line if line.endswith(b"\n") else line + b"\n")
                numbers.append(self.num_read)
                num_bytes += len(line)
            self._lines_of_rows.append(place)
            if len(batch) == BATCH_ROWS or num_bytes > BATCH_BYTES:
                self._on_the_way.append(numbers)
                yield batch
                batch, numbers, num_bytes = [], array("I"), 0
        if batch:
            self._on_the_way.append(numbers)
            yield batch

    def sound(self, result: EncodedLines) -> EncodedLines:
        """The next batch's result; where a line could not be used, the error with its row."""
        numbers = self._on_the_way.popleft()
        if result.error:
            line, message, hint = result.error
            raise DataError(f"Dataset {self._name!r}, row {numbers[line]}: {message}", hint)
        return result

    def take(self, is_document: NDArray[np.bool_], first: int) -> None:
        """Note the examples of the next lines, which are numbered from `first` where they are no documents."""
        examples = np.where(is_document, NO_EXAMPLE, first - 1 + np.cumsum(~is_document))
        self._examples.frombytes(examples.astype(np.int64).tobytes())

    def chats(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each row that is a chat its example, and its number from 1."""
        examples = np.asarray(self._examples, dtype=np.int64)[np.asarray(self._lines_of_rows, dtype=np.intp)]
        rows = np.flatnonzero(examples != NO_EXAMPLE)
        return examples[rows], rows + 1

    def _lines(self) -> Iterator[bytes]:
        with open(self._source, "rb") as file:
            for line in file:
                if line.strip():
                    if self.num_read % PROGRESS_ROWS == 0:
                        self._progress(self.num_read)
                    self.num_read += 1
                    yield line
