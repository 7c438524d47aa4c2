"""Reads JSON and JSONL files by rows. Whatever a file holds, the only error is DataError."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from studio.errors import DataError

MAX_DEPTH = 40
EXPECTED = "Expected UTF-8 text: a JSON list of rows, or one JSON object per line (JSONL)."
UTF8_BOM = b"\xef\xbb\xbf"
OTHER_KINDS = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as JSON",
    b"PAR1": "a Parquet file; export it as JSONL",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it: `value`, or what is wrong with it in `problem`. Numbers count from 1."""

    number: int
    line: int | None
    value: Any = None
    problem: str = ""


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row). Raises DataError that names the file and the row."""
    for row in scan_rows(path):
        if row.problem:
            raise DataError(f"{Path(path).name}, {place(row)}: {row.problem}", EXPECTED)
        yield row.number, row.value


def place(row: RawRow) -> str:
    """'row 3', and its line where the file has one row per line."""
    return f"row {row.number}" if row.line in (None, row.number) else f"row {row.number} (line {row.line})"


def scan_rows(path: Path) -> Iterator[RawRow]:
    """Yield every row, bad ones with their problem. DataError when the file as a whole cannot be read."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            yield from _scan(file, path.name)
    except FileNotFoundError:
        raise DataError(f"There is no file {path.name!r}.", "Choose a .json or .jsonl file.") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise DataError(f"{path.name!r} cannot be read: {error}.", EXPECTED) from error


def _scan(file: BinaryIO, name: str) -> Iterator[RawRow]:
    head = file.read(4)
    for magic, kind in OTHER_KINDS.items():
        if head.startswith(magic):
            raise DataError(f"{name} is {kind}.", EXPECTED)
    start = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
    file.seek(start)
    if _is_jsonl(file):
        file.seek(start)
        yield from _scan_lines(file)
        return
    file.seek(start)
    yield from _scan_document(file.read(), name)


def _is_jsonl(file: BinaryIO) -> bool:
    """Lines, unless the file is one list, or one object written over many lines or holding a list of rows."""
    lines = (line.strip() for line in file if line.strip())
    first, second = next(lines, b""), next(lines, b"")
    if not first or first.startswith(b"["):
        return False
    if second.startswith(b"{"):
        return first not in (b"{", b"[") and not first.endswith((b"[", b",", b":"))
    value, problem = parse(first)
    return not problem and isinstance(value, dict) and (bool(second) or _only_list(value) is None)


def _scan_lines(file: BinaryIO) -> Iterator[RawRow]:
    number = 0
    for line_number, line in enumerate(file, start=1):
        if line.strip():
            number += 1
            value, problem = parse(line)
            yield RawRow(number, line_number, value, problem)


def _scan_document(text: bytes, name: str) -> Iterator[RawRow]:
    if not text.strip():
        raise DataError(f"{name} is empty.", EXPECTED)
    value, problem = parse(text, check=False)
    if problem:
        raise DataError(f"{name}: {problem}", EXPECTED)
    rows = value if isinstance(value, list) else _only_list(value) if isinstance(value, dict) else None
    if rows is None:
        rows = [value]
    if not rows:
        raise DataError(f"{name} holds an empty list.", EXPECTED)
    for number, row in enumerate(rows, start=1):
        yield RawRow(number, None, row, defect(row))


def _only_list(value: dict[str, Any]) -> list[Any] | None:
    """The list of rows in {"data": [...]}; None when the object is itself a row."""
    if not {"messages", "conversation", "conversations", "instruction"}.isdisjoint(value):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 else None


def parse(text: bytes, check: bool = True) -> tuple[Any, str]:
    """(value, "") or (None, what is wrong)."""
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}."
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return None, f"is not valid JSON: {error.msg} at {where}."
    except RecursionError:
        return None, f"is nested too deeply; at most {MAX_DEPTH} levels are allowed."
    except ValueError as error:
        return None, f"is not valid JSON: {error}"
    problem = defect(value) if check else ""
    return (None, problem) if problem else (value, "")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number.")


def defect(value: Any) -> str:
    """What in a parsed row could not be written, tokenized or stored again; "" when nothing."""
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            return f"is nested too deeply; at most {MAX_DEPTH} levels are allowed."
        if isinstance(item, str) and (problem := _text_defect(item)):
            return problem
        if isinstance(item, float) and not math.isfinite(item):
            return "holds a number too large to store."
        if isinstance(item, dict):
            pending += [(child, depth + 1) for pair in item.items() for child in pair]
        elif isinstance(item, list):
            pending += [(child, depth + 1) for child in item]
    return ""


def _text_defect(text: str) -> str:
    if "\0" in text:
        return "holds a NUL character (\\u0000) in its text."
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a character (lone surrogate U+{ord(text[error.start]):04X}) in its text."
    return ""
