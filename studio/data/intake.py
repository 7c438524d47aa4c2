"""From a source to the rows of a dataset, in bounded memory: what is good goes on, what is bad is counted and named."""

import filecmp
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from studio.data.columns import Columns
from studio.data.conversation import Conversation
from studio.data.files import data_files
from studio.data.formats import SHOWN_PROBLEMS, RowProblem, bad_rows, convert_rows, require_format
from studio.data.rows import RawRow
from studio.errors import DataError
from studio.paths import atomic_path, inside, require_free_space, slugify

HUB_PREFIXES = ("hf:", "modelscope:")


@dataclass(frozen=True)
class Reading:
    """How rows are read: a format ("" recognises each row), columns by hand ("" for none), and what bad rows mean."""

    format: str = ""
    columns: str = ""
    keep_good: bool = False

    def check(self) -> None:
        """Raises DataError for a format or columns that there are not."""
        require_format(self.format or None)
        if self.columns:
            Columns.parse(self.columns)

    def origin(self) -> dict[str, Any]:
        """What a dataset remembers of it."""
        columns = {"columns": self.columns} if self.columns else {}
        return {"format": self.format or "auto"} | columns


@dataclass
class Tally:
    """What became of the rows so far; the first problems in words, and how many are the same as the first."""

    num_good: int = 0
    num_bad: int = 0
    num_like_first: int = 0
    problems: list[RowProblem] = field(default_factory=list)


def good_rows(
    rows: Iterable[RawRow], reading: Reading, source: str, tally: Tally
) -> Iterator[tuple[RawRow, Conversation]]:
    """A source's rows with the conversations that they become.

    At the end it raises DataError with the first bad rows, unless good ones are to be kept; and when none is good.
    """
    columns = Columns.parse(reading.columns) if reading.columns else None
    for raw, result in convert_rows(rows, reading.format or None, columns):
        if not isinstance(result, RowProblem):
            tally.num_good += 1
            yield raw, result
            continue
        tally.num_bad += 1
        if len(tally.problems) < SHOWN_PROBLEMS:
            tally.problems.append(result)
        tally.num_like_first += result.message == tally.problems[0].message
    if tally.num_bad and not (reading.keep_good and tally.num_good):
        total = tally.num_bad + tally.num_good
        raise bad_rows(source, tally.problems, tally.num_bad, total, all_alike=tally.num_like_first == total)
    if not tally.num_good:
        raise DataError(f"{source} holds no usable row.", "Choose another file, or another format.")


def keep_source(folder: Path, path: Path) -> Path:
    """Copy a file, or a folder's data files, into the project's data/source and return the copy.

    A source that is there already is used again; one of the same name with other content is left as it is.
    """
    files = data_files(path)
    size = sum(file.stat().st_size for file in files)
    sources = inside(folder, "data/source")
    suffixes = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    stem = path.name.removesuffix(path.name[-len(suffixes) :]) if suffixes and path.is_file() else path.name
    for number in count(1):
        tail = f"-{number}" if number > 1 else ""
        target = sources / f"{slugify(stem)}{tail}{suffixes if path.is_file() else ''}"
        if not target.exists():
            break
        if _same(path, target, files):
            return target
    require_free_space(sources, size, f"a copy of {path.name}")
    with atomic_path(target) as temporary:
        if path.is_file():
            shutil.copyfile(path, temporary)
        else:
            _copy_files(path, files, temporary)
    return target


def _copy_files(folder: Path, files: list[Path], target: Path) -> None:
    for file in files:
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _same(path: Path, there: Path, files: list[Path]) -> bool:
    if path.is_file():
        return there.is_file() and filecmp.cmp(path, there, shallow=False)
    if not there.is_dir() or len(files) != sum(each.is_file() for each in there.rglob("*")):
        return False
    pairs = [(file, there / file.relative_to(path)) for file in files]
    return all(copy.is_file() and filecmp.cmp(file, copy, shallow=False) for file, copy in pairs)
