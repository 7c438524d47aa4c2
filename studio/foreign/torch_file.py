"""A `.pth` or `.pt` file that torch saved, opened without torch: its plain values at once, its tensors when asked.

A sound file is a zip of uncompressed members: `data.pkl` (see `studio.foreign.pickles`) and one member a storage. Every
member's CRC-32 is compared before its bytes are handed out, and the bytes are mapped, not read into memory.
"""

import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from studio.errors import UNREADABLE_ZIP, CheckpointError, UnsafeFileError
from studio.foreign.pickles import NEXT_MOVE, Storage, read_pickle, require_readable_size

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
LOCAL_SIGNATURE = b"PK\x03\x04"
# Encrypted, patched, strongly encrypted, header masked: nothing that torch writes, and a way to show tools two files.
ODD_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000
CHUNK_BYTES = 2**24
MAX_MEMBERS = 500_000


class TorchFile:
    """`content` is the value that was saved, usually a dictionary; its tensors are `StoredTensor`s of this file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a missing, damaged or odd file, UnsafeFileError for one that holds code."""
        self.path = Path(path)
        self._members = _members(self.path)
        self._root = _root(self.path, self._members)
        require_readable_size(self._members[f"{self._root}/data.pkl"].file_size, self.path.name)  # before it is copied
        self._map = _mapped(self.path)
        self._checked: set[str] = set()
        if self._member("byteorder", default=b"little") != b"little":
            raise CheckpointError(f"{self.path.name} was written on a big-endian machine.", "Save it again elsewhere.")
        self.content: Any = read_pickle(bytes(self._member("data.pkl")), self, self.path.name)

    def bytes_of(self, storage: Storage) -> memoryview:
        """The bytes of a storage, checked against their checksum; copy-on-write, so that the file cannot change."""
        data = self._member(f"data/{storage.key}")
        if len(data) != storage.num_bytes:
            raise self._damaged(f"storage {storage.key} has {len(data)} bytes instead of {storage.num_bytes}")
        return data

    def _member(self, name: str, default: bytes | None = None) -> memoryview:
        info = self._members.get(f"{self._root}/{name}")
        if info is None and default is not None:
            return memoryview(default)
        if info is None:
            raise self._damaged(f"{name} is missing")
        data = memoryview(self._map)[self._start(info) :][: info.file_size]
        if name not in self._checked and (len(data) != info.file_size or _crc(data) != info.CRC):
            raise self._damaged(f"{name} does not have its checksum")
        self._checked.add(name)
        return data

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin; the header before them must tell the same as the archive's directory."""
        header = bytes(self._map[info.header_offset : info.header_offset + LOCAL_HEADER.size])
        if len(header) < LOCAL_HEADER.size or not header.startswith(LOCAL_SIGNATURE):
            raise self._damaged(f"{info.filename} is not where the directory says")
        _, _, flags, method, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        at = info.header_offset + LOCAL_HEADER.size
        if self._map[at : at + name_length] != info.orig_filename.encode() or method != 0 or flags & ODD_FLAGS:
            raise self._damaged(f"{info.filename} has another header than the directory says")
        return at + name_length + extra_length

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is damaged: {reason}.", NEXT_MOVE)


def open_dictionary(path: Path) -> TorchFile:
    """A file whose content is a dictionary. Raises CheckpointError, UnsafeFileError."""
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise CheckpointError(f"{file.path.name} holds a {type(file.content).__name__}, not a checkpoint.", NEXT_MOVE)
    return file


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's directory by name; only what torch writes: plain members, each name once, nothing before them."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r}.", "Give a `.pth` or `.pt` file.")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except UNREADABLE_ZIP as error:
        raise not_a_zip(path, error) from error
    found = {info.filename: info for info in infos}
    starts = [info.header_offset for info in infos]
    if len(found) != len(infos) or len(infos) > MAX_MEMBERS or min(starts, default=-1) != 0:
        raise UnsafeFileError(f"{path.name} is not an archive as torch writes it; it was not opened.", NEXT_MOVE)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsafeFileError(f"{path.name} holds compressed members; it was not opened.", NEXT_MOVE)
        if info.flag_bits & ODD_FLAGS:
            raise UnsafeFileError(f"{info.filename} in {path.name} is marked as encrypted.", NEXT_MOVE)
    return found


def _root(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder in the archive: two pickles, or TorchScript code, are tricks against scanners."""
    pickles = [name for name in members if name.endswith(".pkl")]
    if len(pickles) != 1 or not pickles[0].endswith("/data.pkl") or pickles[0].count("/") != 1:
        raise UnsafeFileError(f"{path.name} does not have exactly one data.pkl; it was not opened.", NEXT_MOVE)
    return pickles[0].partition("/")[0]


def not_a_zip(path: Path, error: Exception) -> CheckpointError:
    """What a file is that cannot be opened as an archive: a bare pickle, one cut short, or something else."""
    with open(path, "rb") as file:
        start = file.read(2)
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if start[:1] == b"\x80":
        return UnsafeFileError(
            f"{path.name} is a bare pickle, which can run code when it is opened; it was not opened.",
            "Ask for the weights as safetensors, or as a `.pth` saved by torch 1.6 or newer.",
        )
    if start == b"PK":
        return CheckpointError(f"{path.name} is cut short or damaged: {reason}.", NEXT_MOVE)
    return CheckpointError(f"{path.name} is not a `.pth` file.", "Checkpoints are zip archives written by torch.save.")


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _crc(data: memoryview) -> int:
    crc = 0
    for start in range(0, len(data), CHUNK_BYTES):
        crc = zlib.crc32(data[start : start + CHUNK_BYTES], crc)
    return crc
