"""A row as a file has it, and what in it could not be stored or trained."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from studio.paths import human_bytes

MAX_DEPTH = 40
MAX_ROW_BYTES = 64 * 2**20
TOO_DEEP = f"is nested too deeply; at most {MAX_DEPTH} levels are allowed."
TOO_LONG = f"is longer than {human_bytes(MAX_ROW_BYTES)}, the most a row may have; split it."
# orjson rounds integers beyond 64 bits; a run of so many digits is found faster so than by a pattern.
DIGITS = bytes(ord("0") if chr(byte).isdecimal() else byte for byte in range(128)) + bytes(range(128, 256))
LONG_NUMBER = b"0" * 19


class BadRow(Exception):
    """What is wrong with the row at hand; becomes a DataError or a RowProblem."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file has it: `value`, or what is wrong with it in `problem`. Numbers count from 1, by file.

    `file` names the file where a folder has several.
    """

    number: int
    line: int | None
    value: Any = None
    problem: str = ""
    file: str = ""


def place(row: RawRow) -> str:
    """'row 3', with its line where the file has one row per line, and its file where there are several."""
    words = f"row {row.number}" if row.line in (None, row.number) else f"row {row.number} (line {row.line})"
    if not row.file:
        return words
    return f"{row.file}, {words}" if row.number else row.file


def parse(text: bytes) -> tuple[Any, str]:
    """(value, "") or (None, what is wrong). What comes without a problem has none in its depths either."""
    if len(text) > MAX_ROW_BYTES:
        return None, TOO_LONG
    try:
        exact = LONG_NUMBER not in text.translate(DIGITS)
        value = orjson.loads(text) if exact else DECODER.decode(text.decode("utf-8"))
    except ValueError:
        return None, _why_not_json(text)
    if b"\\u0000" in text or text.count(b"{") + text.count(b"[") > MAX_DEPTH:
        problem = defect(value)
        return (None, problem) if problem else (value, "")
    return value, ""


def _why_not_json(text: bytes) -> str:
    """Words for what orjson refused; the slower parser knows them better."""
    try:
        return defect(DECODER.decode(text.decode("utf-8"))) or "is not valid JSON."
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return f"is not valid JSON: {what_is_wrong(error)} at {where}."
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return f"is not valid JSON: {error}"


def what_is_wrong(error: json.JSONDecodeError) -> str:
    """The parser's words without a place: some end in "at", for the place that they have no more."""
    return error.msg.removesuffix(" starting at").removesuffix(" at")


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number.")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("it holds a number too large to store.")
    return number


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def defect(value: Any) -> str:
    """What in a parsed row could not be written, tokenized or stored again; "" when nothing."""
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            return TOO_DEEP
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


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: object) -> str:
    """'a list', 'null', 'the number 5': how a message calls a value that is not what it should be."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {shortened(value)}")
