"""Datasets tokenised once: kept in the project under a key of everything that shapes the ids, so never stale.

A changed row, template, tokenizer, length or rule of loss gives another key; what is damaged is built again.
"""

import hashlib
import json
import platform
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from studio.data.formats import Conversation
from studio.data.named import Template
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

    Rows and tokens are counted as the dataset has them, `num_distinct` rows are stored. `num_truncated`: rows that
    were cut; `num_untrained`: rows in which nothing is trained. A damaged cache has a size and nothing else.
    """

    key: str
    dataset: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    num_rows: int = 0
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
        """All rows, in the dataset's order."""
        return StoredRows(self.files, np.arange(self.files.num_rows))

    def trainable(self) -> StoredRows:
        """The rows with a trained token, in the dataset's order."""
        return StoredRows(self.files, np.flatnonzero(self.files.trained_tokens()))

    def untrained(self) -> list[int]:
        """Numbers, from 1, of the rows in which nothing is trained."""
        return [int(row) + 1 for row in np.flatnonzero(self.files.trained_tokens() == 0)]


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
        try:
            examples = encode_each(rows, template, tokenizer, recipe.max_length, recipe.loss_on)
            for number, example in enumerate(examples):
                writer.add(rows.sound(number, example))
            writer.close(rows.places)
        finally:
            writer.abandon()
        info = _described(folder.name, name, recipe, TokenFiles(temporary, writer.dtype), writer.dtype)
        atomic_write_json(temporary / META, asdict(info))


def _described(key: str, name: str, recipe: Recipe, files: TokenFiles, dtype: str) -> CacheInfo:
    trained, lengths = files.trained_tokens(), files.lengths()
    return CacheInfo(
        key=key,
        dataset=name,
        recipe=asdict(recipe),
        dtype=dtype,
        num_rows=files.num_rows,
        num_distinct=files.num_examples,
        num_tokens=int(lengths.sum()),
        num_trained_tokens=int(trained.sum(dtype=np.int64)),
        num_truncated=int(files.truncated().sum()),
        num_untrained=int((trained == 0).sum()),
        longest=int(lengths.max(initial=0)),
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        files={each: sha256_of(files.folder / each) for each in FILES},
    )


class _DistinctRows:
    """Yields the different rows of a canonical data file once each, and notes which of them every row is."""

    def __init__(self, source: Path, name: str, progress: Progress) -> None:
        self.places = array("I")  # for each row, the number of its example
        self._first = array("I")  # for each example, its first row, counted from 1
        self._source, self._name, self._progress = source, name, progress

    def __iter__(self) -> Iterator[Conversation]:
        known: dict[bytes, int] = {}
        with open(self._source, "rb") as file:
            for line in file:
                if not line.strip():
                    continue
                if len(self.places) % PROGRESS_ROWS == 0:
                    self._progress(len(self.places))
                mark = hashlib.blake2b(line, digest_size=16).digest()
                number = known.get(mark, len(self._first))
                self.places.append(number)
                if number == len(self._first):
                    self._first.append(len(self.places))
                    if len(known) < MAX_KNOWN_ROWS:
                        known[mark] = number
                    yield self._conversation(line)

    def sound(self, number: int, example: Example | DataError) -> Example:
        """An example that could be made; else the error with its row."""
        if isinstance(example, DataError):
            raise self._at(self._first[number], example) from example
        return example

    def _conversation(self, line: bytes) -> Conversation:
        value, problem = parse(line)
        try:
            if problem:
                raise DataError(problem, "Correct the row, or restore an earlier version of the dataset.")
            return Conversation.from_row(value)
        except DataError as error:
            raise self._at(len(self.places), error) from error

    def _at(self, row: int, error: DataError) -> DataError:
        return DataError(f"Dataset {self._name!r}, row {row}: {error.message}", error.hint)
