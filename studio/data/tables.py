"""Reads tables by rows, in bounded memory: CSV, TSV, Parquet, Arrow, XLSX, XLS. No cell is ever evaluated."""

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from studio.data.rows import MAX_ROW_BYTES, RawRow, defect
from studio.data.streams import Position, open_text
from studio.errors import DataError
from studio.paths import human_bytes

BATCH_ROWS = 256
MAX_SHEET_BYTES = 2 * 2**30
MAX_SHARED_TEXT_BYTES = 512 * 2**20  # is held in memory
FREE_SHEET_BYTES = 64 * 2**20
MAX_SHEET_RATIO = 200
MAX_XLS_BYTES = 128 * 2**20
ZIP, OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # how XLSX and XLS begin
ARROW = b"ARROW1"  # how its file format begins; the stream format has no mark
SHARED_TEXT = "xl/sharedStrings.xml"
# Columns whose cells may hold a list as JSON text, where the kind of file has no lists.
LIST_COLUMNS = frozenset({"messages", "conversation", "conversations", "history", "chosen", "rejected", "tools"})


def scan_csv(path: Path, name: str, position: Position, encoding: str = "") -> Iterator[RawRow]:
    """Rows of a file with a header line; cells are text. Line breaks inside quotes belong to the cell."""
    stream = open_text(path, position, encoding)
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="") as text:
        suffix = path.suffix.lower() if path.suffix.lower() != ".gz" else Path(path.stem).suffix.lower()
        reader = _records(text, "\t" if suffix in (".tsv", ".tab") else "")
        header = next((record for record in reader if isinstance(record, str) or any(record)), None)
        if header is None:
            raise DataError(f"{name} is empty.", "Expected a header line and a row below it.")
        if isinstance(header, str):
            raise DataError(f"{name}, header: {header}", "Save it as CSV again.")
        yield from _rows(_names(header), reader, name)


def _records(text: io.TextIOWrapper, delimiter: str) -> Iterator[list[str] | str]:
    """Records, or what is wrong with one of them."""
    first = next(text, "")
    reader = csv.reader(_after(first, text), delimiter=delimiter or _delimiter(first), strict=True)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"is not valid CSV: {error} (line {reader.line_num})."


def _after(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    """The sign that parts the names; a comma unless another one is more frequent."""
    return max(",;\t", key=header.count)


def _names(header: Sequence[object]) -> list[str]:
    """Column names, made different where they are empty or come twice."""
    names: list[str] = []
    for number, cell in enumerate(header, start=1):
        name = str(cell).strip() if cell is not None else ""
        name = name or f"column {number}"
        names.append(name if name not in names else f"{name} ({number})")
    return names


def _rows(names: list[str], records: Iterable[Sequence[Any] | str], name: str) -> Iterator[RawRow]:
    number = 0
    for record in records:
        if isinstance(record, str):
            number += 1
            yield RawRow(number, None, problem=record)
        elif any(cell not in (None, "") for cell in record):
            number += 1
            yield _row(number, names, record)
    if not number:
        raise DataError(f"{name} has a header ({', '.join(names)[:200]}) and no row.", "Put a row below it.")


def _row(number: int, names: list[str], record: Sequence[Any]) -> RawRow:
    """A short record lacks empty cells at its end; a longer one than the header is broken."""
    extra = [cell for cell in record[len(names) :] if cell not in (None, "")]
    if extra:
        return RawRow(number, None, problem=f"has {len(record)} cells, and the header {len(names)} names.")
    cells = [*record, *[""] * (len(names) - len(record))]
    value = {name: _unfolded(name, cell) for name, cell in zip(names, cells, strict=False)}
    return raw_row(number, value)


def _unfolded(name: str, cell: Any) -> Any:
    if name not in LIST_COLUMNS or not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # some are Python's notation; the format that knows it reads it


def raw_row(number: int, value: Any) -> RawRow:
    """A row of plain values, checked."""
    value = plain(value)
    problem = defect(value)
    return RawRow(number, None, None if problem else value, problem)


def plain(value: Any, depth: int = 0) -> Any:
    """The value in JSON's terms: dates as text, what is no number as None, deeper ones likewise."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict) and depth < 60:
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth < 60:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else str(value)[:MAX_ROW_BYTES]


def scan_parquet(path: Path, name: str, position: Position) -> Iterator[RawRow]:
    import pyarrow.parquet

    start = position.done
    with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as table:
        total = table.metadata.num_rows
        batches = table.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
        for row in _batch_rows(batches, name):
            position.done = start + path.stat().st_size * row.number // max(1, total)
            yield row


def scan_arrow(path: Path, name: str, position: Position) -> Iterator[RawRow]:
    """A file as `datasets.save_to_disk` writes it: Arrow's stream format, or its file format."""
    import pyarrow
    import pyarrow.ipc

    with pyarrow.OSFile(str(path)) as source:  # a map of a cut file would end the process
        if source.read(len(ARROW)) == ARROW:
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from _batch_rows(_small(batches), name)
    position.done += path.stat().st_size


def _small(batches: Iterable[Any]) -> Iterator[Any]:
    """Arrow trusts the offsets in a file; a damaged one would read, and end, where there is no memory."""
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _batch_rows(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield raw_row(number, value)
    if not number:
        raise DataError(f"{name} holds no rows.", "Choose a file with rows.")


def scan_xlsx(path: Path, name: str, position: Position, sheet: str = "") -> Iterator[RawRow]:
    """Rows of a sheet, the first one unless named. Of a formula the value stored with it, else its text."""
    import openpyxl

    has_formulas = _checked_archive(path, name)
    values = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
    texts = openpyxl.load_workbook(path, read_only=True, keep_links=False) if has_formulas else None
    try:
        records = _sheet(values, sheet, name).iter_rows(values_only=True)
        if texts is not None:
            records = _filled(records, _sheet(texts, sheet, name).iter_rows(values_only=True))
        yield from _below_header(records, name)
    finally:
        values.close()
        if texts is not None:
            texts.close()
    position.done += path.stat().st_size


def _checked_archive(path: Path, name: str) -> bool:
    """Whether a sheet has formulas. DataError when it is no workbook, or one that was made to fill the memory.

    What an archive says of its sizes holds: Python's zipfile stops there.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if "xl/workbook.xml" not in sizes:
            raise DataError(f"{name} is a zip archive and no workbook.", "Unpack it, and import what is inside.")
        total, packed = sum(sizes.values()), max(1, path.stat().st_size)
        if total > MAX_SHEET_BYTES or sizes.get(SHARED_TEXT, 0) > MAX_SHARED_TEXT_BYTES:
            raise DataError(f"{name} unpacks to {human_bytes(total)}, too much for a workbook.", "Save it as CSV.")
        if total > FREE_SHEET_BYTES and total > MAX_SHEET_RATIO * packed:
            raise DataError(f"{name} unpacks to {total // packed} times its size.", "Save it as CSV.")
        sheets = [entry for entry in sizes if entry.startswith("xl/worksheets/")]
        return any(_contains(archive, entry, b"<f") for entry in sheets)


def _contains(archive: zipfile.ZipFile, entry: str, wanted: bytes) -> bool:
    with archive.open(entry) as file:
        tail = b""
        while chunk := file.read(2**20):
            if wanted in tail + chunk:
                return True
            tail = chunk[-len(wanted) :]
    return False


def _sheet(book: Any, wanted: str, name: str) -> Any:
    names = [sheet.title for sheet in book.worksheets]
    if not names:
        raise DataError(f"{name} has no sheet with cells.", "Save it with one.")
    if wanted and wanted not in names:
        raise DataError(f"{name} has no sheet {wanted!r}.", f"Its sheets: {', '.join(names)}.")
    return book[wanted or names[0]]


def _filled(values: Iterable[tuple[Any, ...]], texts: Iterable[tuple[Any, ...]]) -> Iterator[list[Any]]:
    for value_row, text_row in zip(values, texts, strict=False):
        yield [text if value is None else value for value, text in zip(value_row, text_row, strict=False)]


def _below_header(records: Iterable[Sequence[Any]], name: str) -> Iterator[RawRow]:
    rows = iter(records)
    header = next((row for row in rows if any(cell is not None for cell in row)), None)
    if header is None:
        raise DataError(f"{name} has no cells.", "Expected a header line and a row below it.")
    while header and header[-1] is None:
        header = header[:-1]
    yield from _rows(_names(header), rows, name)


def sheet_names(path: Path) -> list[str]:
    """The sheets of a workbook; none for a file that is no workbook, or one that cannot be opened."""
    with open(path, "rb") as file:
        head = file.read(8)
    try:
        if head.startswith(ZIP):
            return _xlsx_names(path)
        return _xls_names(path) if head == OLE else []
    except Exception:  # openpyxl and xlrd raise many kinds on damaged files; reading the rows says what is wrong
        return []


def _xlsx_names(path: Path) -> list[str]:
    import openpyxl

    _checked_archive(path, path.name)
    book = openpyxl.load_workbook(path, read_only=True, keep_links=False)
    try:
        return [sheet.title for sheet in book.worksheets]
    finally:
        book.close()


def _xls_names(path: Path) -> list[str]:
    import xlrd

    if path.stat().st_size > MAX_XLS_BYTES:
        return []
    book = xlrd.open_workbook(path, on_demand=True, logfile=io.StringIO())
    try:
        return list(book.sheet_names())
    finally:
        book.release_resources()


def scan_xls(path: Path, name: str, position: Position, sheet: str = "") -> Iterator[RawRow]:
    import xlrd

    if path.stat().st_size > MAX_XLS_BYTES:
        raise DataError(f"{name} is larger than {human_bytes(MAX_XLS_BYTES)}.", "Save it as XLSX or CSV.")
    book = xlrd.open_workbook(path, on_demand=True, logfile=io.StringIO())
    try:
        names = book.sheet_names()
        if sheet and sheet not in names:
            raise DataError(f"{name} has no sheet {sheet!r}.", f"Its sheets: {', '.join(names)}.")
        cells = book.sheet_by_name(sheet) if sheet else book.sheet_by_index(0)
        records = ([_cell(cell, book.datemode) for cell in cells.row(row)] for row in range(cells.nrows))
        yield from _below_header(records, name)
    finally:
        book.release_resources()
    position.done += path.stat().st_size


def _cell(cell: Any, datemode: int) -> Any:
    """XLS keeps every number as a float and dates as numbers; errors (#N/A) are no data."""
    import xlrd

    if cell.ctype == xlrd.XL_CELL_DATE:
        return xlrd.xldate_as_datetime(cell.value, datemode)
    if cell.ctype == xlrd.XL_CELL_BOOLEAN:
        return bool(cell.value)
    if cell.ctype in (xlrd.XL_CELL_EMPTY, xlrd.XL_CELL_BLANK, xlrd.XL_CELL_ERROR):
        return None
    return int(cell.value) if isinstance(cell.value, float) and cell.value.is_integer() else cell.value
