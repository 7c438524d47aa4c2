"""Rows of any file or folder of files, one after the other. Whatever a file holds, the only error is DataError."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from studio.data.json_rows import scan_json
from studio.data.rows import MAX_ROW_BYTES, RawRow, place
from studio.data.streams import Position, found_encoding, is_gzip, open_text
from studio.data.tables import ARROW, OLE, ZIP, raw_row, scan_arrow, scan_csv, scan_parquet, scan_xls, scan_xlsx
from studio.errors import DataError
from studio.paths import human_bytes

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv", ".tab")
DATA_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet", ".arrow", ".xlsx", ".xlsm", ".xls")
TEXT_SUFFIXES = (".txt", ".md", ".markdown")
SUFFIXES = (*DATA_SUFFIXES, *TEXT_SUFFIXES)
ALLOWED = "Allowed: JSON, JSONL, CSV, TSV, Parquet, XLSX, XLS, plain text, Markdown, these as .gz, and folders of them."
# Files beside the data in folders of the hub, of `save_to_disk` and of git.
NO_DATA = frozenset({"readme.md", "license.txt", "license.md", "dataset_info.json", "dataset_infos.json", "state.json",
                     "dataset_dict.json", "config.json", "package.json"})  # fmt: skip
MAX_FILES = 100_000
# How a file begins that is not what its name says, or no data at all.
PARQUET, PDF = b"PAR1", b"%PDF"


@dataclass(frozen=True)
class ReadOptions:
    """`encoding` of text, "" to find it out; `sheet` of a workbook, "" for the first."""

    encoding: str = ""
    sheet: str = ""


def scan(path: Path, options: ReadOptions | None = None, position: Position | None = None) -> Iterator[RawRow]:
    """Yield every row of a file or folder, bad ones with their problem, in bounded memory.

    `position` is moved along in bytes. Raises DataError when the file as a whole cannot be read; a file of a folder
    that cannot gives one row 0 with that problem instead.
    """
    path, options, position = Path(path), options or ReadOptions(), position or Position()
    files = data_files(path)
    position.total = sum(file.stat().st_size for file in files)
    if not path.is_dir():
        yield from _scan_file(path, options, position)
        return
    for file in files:
        name = file.relative_to(path).as_posix()
        try:
            for row in _scan_file(file, options, position):
                yield replace(row, file=name)
        except DataError as error:
            yield RawRow(0, None, problem=error.message, file=name)


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row). Raises DataError that names the file and the row."""
    for row in scan(path):
        if row.problem:
            raise DataError(f"{Path(path).name}, {place(row)}: {row.problem}", "Correct the row.")
        yield row.number, row.value


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a folder, sorted by path. DataError when there is none.

    Texts count where a folder holds nothing else, so that a README beside a table is no document.
    """
    try:
        if path.is_file():
            return [path]
        found = _below(path) if path.is_dir() else []
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise DataError(f"{str(path)!r} cannot be read: {error}.", ALLOWED) from error
    if not path.is_dir():
        raise DataError(f"There is no file {str(path)!r}.", "Give its full path.")
    files = [file for file in found if suffix_of(file) in DATA_SUFFIXES] or found
    if not files:
        raise DataError(f"The folder {path.name!r} holds no file of data.", ALLOWED)
    return files


def suffix_of(path: Path) -> str:
    """ ".csv" of "a.csv" and of "a.csv.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def encoding_of(path: Path) -> str:
    """The encoding that a file of text is found to be in, as `scan` finds it; "" for a folder and for other kinds."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        head = file.read(8)
    return "" if head.startswith((PARQUET, ZIP, OLE, ARROW, PDF)) else found_encoding(path)


def _below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and name.lower() not in NO_DATA and suffix_of(path) in SUFFIXES:
                found.append(path)
        if len(found) > MAX_FILES:
            raise DataError(f"The folder {folder.name!r} holds more than {MAX_FILES} files.", "Join some of them.")
    return sorted(file for file in found if file.is_file())


def _scan_file(path: Path, options: ReadOptions, position: Position) -> Iterator[RawRow]:
    """One file's rows. Readers of foreign kinds raise whatever they like on damaged files; it becomes a DataError."""
    name, end = path.name, position.done + path.stat().st_size
    try:
        yield from _reader(path, options, position)
    except DataError:
        raise
    except UnicodeError as error:
        raise DataError(f"{name} is not text of a known encoding: {error}.", "Save it as UTF-8.") from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{name} cannot be read: {str(error)[:200] or type(error).__name__}.", ALLOWED) from error
    except Exception as error:  # openpyxl, xlrd and pyarrow raise KeyError, struct.error, AssertionError and more
        raise DataError(f"{name} is damaged: {type(error).__name__}: {str(error)[:200]}.", ALLOWED) from error
    position.done = end


def _reader(path: Path, options: ReadOptions, position: Position) -> Iterator[RawRow]:
    """What the content says goes before the suffix."""
    name, suffix = path.name, suffix_of(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(PARQUET):
        return scan_parquet(path, name, position)
    if head.startswith(ZIP):
        return scan_xlsx(path, name, position, options.sheet)
    if head.startswith(OLE):
        return _scan_ole(path, name, position, options.sheet)
    if head.startswith(ARROW) or suffix == ".arrow":
        return scan_arrow(path, name, position)
    if head.startswith(PDF) or (suffix in (".parquet", ".xlsx", ".xlsm", ".xls") and not is_gzip(path)):
        raise DataError(f"{name} is {'a PDF file' if head.startswith(PDF) else 'not what its name says'}.", ALLOWED)
    if path.suffix.lower() == ".gz" and not is_gzip(path):
        raise DataError(f"{name} is not gzip, as its name says.", "Name it as what it is, or pack it again.")
    if suffix in CSV_SUFFIXES:
        return scan_csv(path, name, position, options.encoding)
    if suffix in TEXT_SUFFIXES:
        return _scan_text(path, name, position, options.encoding)
    return _scan_json(path, name, position, options.encoding)


def _scan_ole(path: Path, name: str, position: Position, sheet: str) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        encrypted = "EncryptedPackage".encode("utf-16-le") in file.read(2**20)
    if encrypted:
        raise DataError(f"{name} is protected with a password.", "Save it without one.")
    return scan_xls(path, name, position, sheet)


def _scan_json(path: Path, name: str, position: Position, encoding: str) -> Iterator[RawRow]:
    with closing(open_text(path, position, encoding)) as stream:
        yield from scan_json(stream, name)


def _scan_text(path: Path, name: str, position: Position, encoding: str) -> Iterator[RawRow]:
    """A whole file as one document."""
    with closing(open_text(path, position, encoding)) as stream:
        content = stream.read(MAX_ROW_BYTES + 1)
    if len(content) > MAX_ROW_BYTES:
        raise DataError(
            f"{name} is longer than {human_bytes(MAX_ROW_BYTES)}, the most one document may have.", "Split it."
        )
    text = content.decode("utf-8").replace("\r\n", "\n")
    if not text.strip():
        raise DataError(f"{name} is empty.", "Write something into it.")
    yield raw_row(1, {"text": text})
