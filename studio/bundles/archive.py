"""A zip that is written the same every time, and read as a stranger's: only known names, no links, nothing too large.

What a zip says of itself is not believed: an entry is read no further than its listed size, and its sha256 is compared.
"""

import hashlib
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from studio.errors import UNREADABLE_ZIP, BundleError
from studio.paths import atomic_path, human_bytes, require_free_space

MOST_ENTRIES = 500
MOST_BYTES = 16 * 2**30  # unpacked, in all
PIECE_BYTES = 2**20
BEGINNING_OF_TIME = (1980, 1, 1, 0, 0, 0)
READABLE_FILE = (stat.S_IFREG | 0o644) << 16
UNIX, ENCRYPTED = 3, 0x1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGED = "Get the bundle again; it was cut or changed on the way."
HOSTILE = "Do not use it: `retune bundle` makes no such file."


def write_zip(path: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Write entries in the order of their names; equal contents give equal bytes. Raises DiskFullError."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(contents):
            _write_entry(archive, name, contents[name])


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, BEGINNING_OF_TIME)
    entry.create_system, entry.external_attr = UNIX, READABLE_FILE
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
    with archive.open(entry, "w") as target:
        if isinstance(content, bytes):
            target.write(content)
            return
        with open(content, "rb") as source:
            while piece := source.read(PIECE_BYTES):
                target.write(piece)


class SafeZip:
    """A zip from anywhere, a file or one that was uploaded, open for reading. Use as a context manager.

    Raises BundleError when it is not one, or holds what no bundle holds.
    """

    def __init__(self, source: Path | BinaryIO) -> None:
        name = source.name if isinstance(source, Path) else "The file"
        try:
            self._archive = zipfile.ZipFile(source)
        except FileNotFoundError:
            raise BundleError(
                f"There is no file {str(source)!r}.", "Give the .zip that `retune bundle` wrote."
            ) from None
        except UNREADABLE_ZIP as error:
            raise BundleError(f"{name} is not a whole zip file: {error}.", DAMAGED) from error
        try:
            self._entries = _checked(name, self._archive.infolist())
        except BundleError:
            self._archive.close()
            raise

    def __enter__(self) -> "SafeZip":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def size(self, name: str) -> int:
        """Unpacked bytes of an entry, as the zip says. Raises BundleError when there is no such entry."""
        return self._entry(name).file_size

    def read(self, name: str, most_bytes: int) -> bytes:
        """An entry of at most so many bytes."""
        if self.size(name) > most_bytes:
            size, most = human_bytes(self.size(name)), human_bytes(most_bytes)
            raise BundleError(f"{name} in the bundle has {size}; it may have {most}.", HOSTILE)
        with self._open(name) as source:
            return _take(source, name, self.size(name))

    def sha256(self, name: str) -> str:
        """Hash of an entry's content, read in pieces."""
        digest = hashlib.sha256()
        self._copy(name, digest.update)
        return digest.hexdigest()

    def unpack(self, name: str, target: Path) -> None:
        """Write an entry to a file of ours; its name in the zip decides nothing. Raises DiskFullError too."""
        require_free_space(target.parent, self.size(name), f"the bundle's {name}")
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            self._copy(name, file.write)

    def _copy(self, name: str, take: Callable[[bytes], object]) -> None:
        left = self.size(name)
        with self._open(name) as source:
            while left:
                piece = _take(source, name, min(left, PIECE_BYTES))
                take(piece)
                left -= len(piece)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self._entries:
            raise BundleError(f"The bundle lacks {name}.", DAMAGED)
        return self._entries[name]

    def _open(self, name: str) -> IO[bytes]:
        try:
            return self._archive.open(self._entry(name))
        except UNREADABLE_ZIP as error:
            raise BundleError(f"{name} in the bundle cannot be read: {error}.", DAMAGED) from error


def _take(source: IO[bytes], name: str, num_bytes: int) -> bytes:
    """Exactly so many bytes. Raises BundleError."""
    try:
        piece = source.read(num_bytes)
    except UNREADABLE_ZIP as error:
        raise BundleError(f"{name} in the bundle is damaged: {error}.", DAMAGED) from error
    if len(piece) != num_bytes:
        raise BundleError(f"{name} in the bundle is shorter than the zip says.", DAMAGED)
    return piece


def _checked(file: str, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Entries by name. Raises BundleError for one that no bundle of ours has."""
    if len(entries) > MOST_ENTRIES:
        raise BundleError(f"{file} has {len(entries)} entries; a bundle has at most {MOST_ENTRIES}.", HOSTILE)
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        if problem := _problem(entry, found):
            raise BundleError(f"{file} holds {entry.orig_filename[:120]!r}, which {problem}.", HOSTILE)
        found[entry.filename] = entry
    if (total := sum(entry.file_size for entry in entries)) > MOST_BYTES:
        most = human_bytes(MOST_BYTES)
        raise BundleError(f"{file} would unpack to {human_bytes(total)}; a bundle has at most {most}.", HOSTILE)
    return found


def _problem(entry: zipfile.ZipInfo, before: Mapping[str, object]) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if entry.filename in before:
        return "is there twice"
    if entry.filename != entry.orig_filename:
        return "has a name with a NUL character"
    if entry.is_dir() or kind not in (0, stat.S_IFREG):
        return "is a link, a folder or a device"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    return "" if entry.compress_type in METHODS else "is packed in a way that bundles are not"
