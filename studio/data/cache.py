"""Datasets tokenised once: kept in the project under a key of everything that shapes the ids, so never stale.

A changed row, template, tokenizer, length or rule of loss gives another key; what is damaged is built again.
"""

import hashlib
import json
import platform
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from studio.data.conversation import Conversation
from studio.data.named import Template
from studio.data.pretrain import sequences
from studio.data.rows import parse
from studio.data.token_files import FILES, StoredRows, TokenFiles, TokenWriter
from studio.data.tokens import Example, TextTokenizer, encode_each
from studio.errors import DataError
from studio.paths import atomic_path, atomic_write_json, folder_bytes, inside, remove, require_free_space, sha256_of

FOLDER = "cache"
META = "meta.json"
MAX_KNOWN_ROWS = 100_000  # different rows that are remembered to recognise their repetition
PROGRESS_ROWS = 256
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
    if "strftime_now" in getattr(template, "source", ""):
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
    with atomic_path(folder) as temporary:
        writer = TokenWriter(temporary, tokenizer.largest_id)
        chats, joined = array("I"), array("I")  # numbers of the examples
        try:
            examples = encode_each(rows, template, tokenizer, recipe.max_length, recipe.loss_on)
            documents = _documents(map(rows.sound, examples), writer, chats)
            for ids in sequences(documents, recipe.max_length):
                joined.append(writer.add(Example(ids, ids)))
            of_rows = np.asarray(chats)[np.asarray(rows.places, dtype=np.intp)]
            writer.close(np.concatenate([of_rows, joined]), np.concatenate([rows.numbers, np.zeros(len(joined))]))
        finally:
            writer.abandon()
        info = _described(TokenFiles(temporary, writer.dtype), rows)
        info = replace(info, key=folder.name, dataset=name, recipe=asdict(recipe), dtype=writer.dtype)
        atomic_write_json(temporary / META, asdict(info))


def _documents(examples: Iterable[Example], writer: TokenWriter, chats: "array[int]") -> Iterator[list[int]]:
    """Write the chats, and yield the ids of raw text, which is joined first."""
    for example in examples:
        if example.is_document:
            yield example.input_ids
        else:
            chats.append(writer.add(example))


def _described(files: TokenFiles, rows: "_DistinctRows") -> CacheInfo:
    trained, lengths = files.trained_tokens(), files.lengths()
    return CacheInfo(
        key="",
        num_rows=rows.num_read,
        num_documents=rows.num_read - len(rows.places),
        num_sequences=files.num_rows - len(rows.places),
        num_distinct=files.num_examples,
        num_tokens=int(lengths.sum()),
        num_trained_tokens=int(trained.sum(dtype=np.int64)),
        num_truncated=int(files.truncated().sum()),
        num_untrained=int((trained[: len(rows.places)] == 0).sum()),
        longest=int(lengths.max(initial=0)),
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        files={each: sha256_of(files.folder / each) for each in FILES},
    )


class _DistinctRows:
    """Yields the different chats of a canonical data file once each, and notes which of them every row is.

    Documents are yielded as often as they come: they are trained as one text.
    """

    def __init__(self, source: Path, name: str, progress: Progress) -> None:
        self.places = array("I")  # for each chat, which of the different ones it is
        self.numbers = array("I")  # for each chat, its row in the dataset, from 1
        self.num_read = 0
        self._on_the_way: deque[int] = deque()  # numbers of the rows that were yielded and have not come back
        self._source, self._name, self._progress = source, name, progress

    def __iter__(self) -> Iterator[Conversation]:
        known: dict[bytes, int] = {}
        num_chats = 0
        for line in self._lines():
            mark = hashlib.blake2b(line, digest_size=16).digest()
            place = known.get(mark)
            if place is None:
                conversation = self._conversation(line)
                self._on_the_way.append(self.num_read)
                if conversation.kind != "text":
                    place, num_chats = num_chats, num_chats + 1
                    if len(known) < MAX_KNOWN_ROWS:
                        known[mark] = place
                    self._note(place)
                yield conversation
            else:
                self._note(place)

    def sound(self, example: Example | DataError) -> Example:
        """The next example that was made of what this yielded; where it could not be, the error with its row."""
        number = self._on_the_way.popleft()
        if isinstance(example, DataError):
            raise self._at(number, example) from example
        return example

    def _lines(self) -> Iterator[bytes]:
        with open(self._source, "rb") as file:
            for line in file:
                if line.strip():
                    if self.num_read % PROGRESS_ROWS == 0:
                        self._progress(self.num_read)
                    self.num_read += 1
                    yield line

    def _note(self, place: int) -> None:
        self.places.append(place)
        self.numbers.append(self.num_read)

    def _conversation(self, line: bytes) -> Conversation:
        value, problem = parse(line)
        try:
            if problem:
                raise DataError(problem, "Correct the row, or restore an earlier version of the dataset.")
            return Conversation.from_row(value)
        except DataError as error:
            raise self._at(self.num_read, error) from error

    def _at(self, row: int, error: DataError) -> DataError:
        return DataError(f"Dataset {self._name!r}, row {row}: {error.message}", error.hint)
