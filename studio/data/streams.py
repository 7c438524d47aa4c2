"""Opens text of any encoding, gzipped or not, as a stream of UTF-8 bytes; a bomb is refused while it unpacks."""

import codecs
import gzip
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from studio.errors import DataError
from studio.paths import human_bytes

GZIP = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
# The longer mark first: UTF-32's begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
CHUNK_BYTES = 2**20
MAX_UNPACKED_BYTES = 64 * 2**30
FREE_UNPACKED_BYTES = 256 * 2**20  # a row repeated 10,000 times packs 1000:1, and is no bomb
MAX_UNPACKED_RATIO = 100
NOT_UTF8 = re.compile("[^\0-\x7f�]")


@dataclass
class Position:
    """How many bytes of the files were read, and how many there are."""

    done: int = 0
    total: int = 0


def open_text(path: Path, position: Position | None = None, encoding: str = "") -> io.BufferedReader:
    """The file as UTF-8 bytes without a byte order mark. What is neither UTF-8, UTF-16 nor GB18030 stays as it is.

    `encoding` "" finds it out, which reads the file once. Raises OSError, ValueError and EOFError where the file is
    damaged, DataError where it is a bomb, or called UTF-8 and in all likelihood is something else.
    """
    if encoding and codecs.lookup(encoding).name == "utf-8" and (found := found_encoding(path)) != "utf-8":
        message = f"{path.name} is not in {encoding}, but in {found}."
        raise DataError(message, "Leave the encoding out, or name that one.")
    encoding = encoding or found_encoding(path)
    stream = _unpacked(path, position)
    if encoding != "utf-8":
        return io.BufferedReader(_Recoded(stream, encoding), CHUNK_BYTES)
    if stream.peek(3)[:3] == UTF8_BOM:
        stream.read(3)
    return stream


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def _unpacked(path: Path, position: Position | None = None) -> io.BufferedReader:
    counted = _Counted(path, position or Position())
    if not is_gzip(path):
        return io.BufferedReader(counted, CHUNK_BYTES)
    return io.BufferedReader(_Unpacked(counted, path), CHUNK_BYTES)


def found_encoding(path: Path) -> str:
    """utf-8, utf-16, utf-32 or gb18030; utf-8 too when it is none of them."""
    with _unpacked(path) as stream:
        head = stream.peek(4)[:4]
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding
        suspicious = _first_not_utf8(stream)
    return "gb18030" if suspicious and _looks_chinese(suspicious) and _decodes(path, "gb18030") else "utf-8"


def _first_not_utf8(stream: BinaryIO) -> bytes:
    """The first chunk that is not UTF-8; empty when all of it is."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    while chunk := stream.read(CHUNK_BYTES):
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError:
            return chunk
    return b""


def _looks_chinese(chunk: bytes) -> bool:
    """Whether most of what is not ASCII is wrong as UTF-8: a single damaged character makes no other encoding."""
    text = chunk.decode("utf-8", "replace")
    return text.count("�") > len(NOT_UTF8.findall(text))


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    with _unpacked(path) as stream:
        try:
            while chunk := stream.read(CHUNK_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, position: Position) -> None:
        self.file = open(path, "rb", buffering=0)
        self.position = position
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        count = self.file.readinto(target) or 0
        self.num_bytes += count
        self.position.done += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """A gzip file's content, as long as it is of a likely size."""

    def __init__(self, packed: _Counted, path: Path) -> None:
        self.packed = packed
        self.name = path.name
        self.content = gzip.GzipFile(fileobj=io.BufferedReader(packed, CHUNK_BYTES))
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        count = self.content.readinto(target)
        self.num_bytes += count
        ratio = self.num_bytes / max(1, self.packed.num_bytes)
        if self.num_bytes > FREE_UNPACKED_BYTES and ratio > MAX_UNPACKED_RATIO:
            raise DataError(
                f"{self.name} unpacks to {ratio:.0f} times its size; that is how an archive made to fill disks looks.",
                "Unpack it yourself when you know what it is.",
            )
        if self.num_bytes > MAX_UNPACKED_BYTES:
            raise DataError(f"{self.name} unpacks to more than {human_bytes(MAX_UNPACKED_BYTES)}.", "Split it.")
        return count

    def close(self) -> None:
        self.content.close()
        self.packed.close()
        super().close()


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8. Raises UnicodeDecodeError where it is not in that encoding."""

    def __init__(self, source: io.BufferedReader, encoding: str) -> None:
        self.source = source
        self.decoder = codecs.getincrementaldecoder(encoding)("strict")
        self.pending = b""
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        while not self.pending and not self.ended:
            chunk = self.source.read(CHUNK_BYTES)
            self.ended = not chunk
            self.pending = self.decoder.decode(chunk, self.ended).encode("utf-8")
        piece, self.pending = self.pending[: len(target)], self.pending[len(target) :]
        target[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.source.close()
        super().close()
