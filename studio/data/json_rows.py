"""Reads JSON and JSONL by rows, in bounded memory. Whatever a file holds, the only error is DataError."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from io import BufferedReader
from itertools import chain
from typing import Any

from studio.data.rows import DECODER, MAX_ROW_BYTES, TOO_DEEP, TOO_LONG, RawRow, defect, not_utf8, parse, what_is_wrong
from studio.errors import DataError
from studio.paths import human_bytes

WHOLE_DOCUMENT_BYTES = 16 * 2**20  # an object that holds a list of rows is read at once up to here
CHUNK_BYTES = 2**20
LONGEST_LITERAL = 12  # -Infinity, \uD83D\uDE00: an error this close to the end of a chunk may be a cut
EXPECTED = "Expected UTF-8 text: a JSON list of rows, or one JSON object per line (JSONL)."
WHITE_SPACE = re.compile(r"[ \t\n\r\ufeff]*")
ROW_KEYS = frozenset({"messages", "conversation", "conversations", "instruction"})


def scan_json(stream: BufferedReader, name: str) -> Iterator[RawRow]:
    """Rows of a UTF-8 stream: JSON or JSONL, told apart by content. DataError where the file cannot be read on."""
    number_of_lines = _skip_blank(stream)
    head = stream.peek(1)
    if not head:
        raise DataError(f"{name} is empty.", EXPECTED)
    if head.lstrip().startswith(b"["):
        yield from scan_document(stream, name)
        return
    first = stream.readline(MAX_ROW_BYTES + 1)
    second, blank_lines = _next_line(stream)
    if not _is_jsonl(first.strip(), second.strip()):
        yield from scan_document(stream, name, first + second)
        return
    _skip_rest(second, stream)
    yield from _scan_lines(chain([first], [b"\n"] * blank_lines, [second], _lines(stream)), number_of_lines)


def _skip_blank(stream: BufferedReader) -> int:
    """Go to the chunk in which the text begins; the number of lines passed."""
    passed = 0
    while (head := stream.peek(1)) and not head.strip():
        passed += stream.read(len(head)).count(b"\n")
    return passed


def _next_line(stream: BufferedReader) -> tuple[bytes, int]:
    """The next line that is not blank, and the number of blank ones before it."""
    blank_lines = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if line.strip():
            return line, blank_lines
        blank_lines += 1
    return b"", blank_lines


def _lines(stream: BufferedReader) -> Iterator[bytes]:
    """Lines; of one that is too long, the beginning."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        yield line
        _skip_rest(line, stream)


def _skip_rest(line: bytes, stream: BufferedReader) -> None:
    """Go to the next line when this one was too long to be read as a whole."""
    cut = len(line) > MAX_ROW_BYTES
    while cut and line and not line.endswith(b"\n"):
        line = stream.readline(CHUNK_BYTES)


def _is_jsonl(first: bytes, second: bytes) -> bool:
    """Lines, unless the file is one object written over many lines or holding a list of rows."""
    if not first:
        return True
    if second.startswith(b"{"):
        return first != b"{" and not first.endswith((b"[", b",", b":"))
    value, problem = parse(first)
    return not problem and isinstance(value, dict) and (bool(second) or _only_list(value) is None)


def _scan_lines(lines: Iterable[bytes], lines_before: int) -> Iterator[RawRow]:
    number = 0
    for line_number, line in enumerate(lines, start=lines_before + 1):
        if text := line.strip():
            number += 1
            value, problem = parse(text)
            yield RawRow(number, line_number, value, problem)


def scan_document(stream: BufferedReader, name: str, start: bytes = b"") -> Iterator[RawRow]:
    """Rows of one JSON value: a list of rows, an object that holds one, or a single row. `start` was read already."""
    text = JsonText(chain([start], iter(lambda: stream.read(CHUNK_BYTES), b"")))
    try:
        yield from _checked(_document_rows(text, name))
        if text.next_sign():
            raise ValueError("Extra data after the end.")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} {not_utf8(error)}", EXPECTED) from None
    except RecursionError:
        raise DataError(f"{name} {TOO_DEEP}", EXPECTED) from None
    except ValueError as error:
        words = str(error) if not isinstance(error, json.JSONDecodeError) else text.where(error)
        raise DataError(f"{name}{text.at_row} is not valid JSON: {words}", EXPECTED) from None


def _checked(rows: Iterator[Any]) -> Iterator[RawRow]:
    for number, value in enumerate(rows, start=1):
        yield RawRow(number, None, value, defect(value))


def _document_rows(text: "JsonText", name: str) -> Iterator[Any]:
    if text.next_sign() == "[":
        yield from _in_list(text, name)
    elif text.next_sign() == "{" and not text.fits(WHOLE_DOCUMENT_BYTES):
        yield from _in_object(text, name)
    else:
        value = text.value()
        rows = _only_list(value) if isinstance(value, dict) else None
        yield from [value] if rows is None else rows


def _in_list(text: "JsonText", name: str) -> Iterator[Any]:
    text.take("[")
    if text.next_sign() == "]":
        raise DataError(f"{name} holds an empty list.", EXPECTED)
    text.row = 1
    while True:
        yield text.value()
        if text.next_sign() == "]":
            break
        text.take(",")
        text.row += 1
    text.row = 0
    text.take("]")


def _in_object(text: "JsonText", name: str) -> Iterator[Any]:
    """The list of rows in a long {"data": [...]}, by rows."""
    lists = 0
    text.take("{")
    while True:
        key = text.value()
        text.take(":")
        if key in ROW_KEYS:
            raise DataError(f"{name} is a single row of more than {human_bytes(WHOLE_DOCUMENT_BYTES)}.", "Split it.")
        if text.next_sign() == "[" and text.sign_after() == "{":
            lists += 1
            yield from _in_list(text, name)
        else:
            text.value()
        if text.next_sign() != ",":
            break
        text.take(",")
    text.take("}")
    if lists != 1:
        raise DataError(f"{name} is an object with {lists} lists of rows; it must have one.", EXPECTED)


def _only_list(value: dict[str, Any]) -> list[Any] | None:
    """The list of rows in {"data": [...]}; None when the object is itself a row."""
    if not ROW_KEYS.isdisjoint(value):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 else None


class JsonText:
    """A window on a long JSON text that moves over it value by value.

    Its methods raise ValueError for what is no JSON, UnicodeDecodeError for what is no UTF-8.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decode = codecs.getincrementaldecoder("utf-8")("strict").decode
        self._text = ""
        self._at = 0
        self._lines_before = 0
        self._ended = False
        self.row = 0

    @property
    def at_row(self) -> str:
        return f", row {self.row}:" if self.row else ""

    def where(self, error: json.JSONDecodeError) -> str:
        """The error's words with its line and column in the whole text."""
        line = self._lines_before + error.lineno
        return f"{what_is_wrong(error)} at {f'line {line}, ' if line > 1 else ''}column {error.colno}."

    def fits(self, num_characters: int) -> bool:
        """Whether the rest of the text is no longer than that."""
        while len(self._text) - self._at <= num_characters and not self._ended:
            self._more()
        return len(self._text) - self._at <= num_characters

    def next_sign(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = WHITE_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def sign_after(self) -> str:
        """The one after `next_sign`, white space left out."""
        while True:
            after = WHITE_SPACE.match(self._text, self._at + 1).end()  # type: ignore[union-attr]
            if after < len(self._text) or self._ended:
                return self._text[after : after + 1]
            self._more()

    def take(self, sign: str) -> None:
        found = self.next_sign()
        if found != sign:
            raise json.JSONDecodeError(
                f"Expecting {sign!r}" + (f", found {found!r}" if found else ""), self._text, self._at
            )
        self._at += 1

    def value(self) -> Any:
        """The next value, read as far as needed."""
        self.next_sign()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut(error):
                    raise
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise ValueError(TOO_LONG)
            self._more()

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_LITERAL

    def _more(self) -> None:
        """Bring in as much again as is there, so that a long value is not tried too often."""
        self._lines_before += self._text.count("\n", 0, self._at)
        pieces, wanted = [self._text[self._at :]], max(CHUNK_BYTES, len(self._text) - self._at)
        while wanted > 0 and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            pieces.append(self._decode(chunk or b"", self._ended))
            wanted -= len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
