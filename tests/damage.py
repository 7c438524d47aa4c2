"""Ways in which a file goes bad: cut short, a bit flipped, a page of zeros, more at the end, a pickle that runs code.

`damaged(content, chance)` gives one of them at random. `watched()` says whether anything ran that must not.
"""

import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

PAGE = 4096
FORBIDDEN = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_watching = False
_seen: list[str] = []


def cut_short(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice([0, 1, len(content) - 1, chance.randrange(len(content))])]


def bit_flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def page_of_zeros(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(max(1, len(content) - PAGE))
    return content[:start] + bytes(min(PAGE, len(content) - start)) + content[start + PAGE :]


def more_at_the_end(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randint(1, 64))


def halves_swapped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(1, len(content))
    return content[place:] + content[:place]


class Bomb:
    """Runs a shell command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("true",)


def hostile_pickle(content: bytes, chance: random.Random) -> bytes:
    """The file's own zip with a pickle that runs code in place of its own, or such a pickle alone."""
    if content[:2] != b"PK" or chance.random() < 0.2:
        return pickle.dumps(Bomb(), protocol=chance.randrange(6))
    result = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            bomb = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps({"state_dict": Bomb()}, 2) if bomb else old.read(name))
    return result.getvalue()


KINDS = (cut_short, bit_flipped, page_of_zeros, more_at_the_end, halves_swapped, hostile_pickle)


def damaged(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """(the kind of damage, the content after it)."""
    kind = chance.choice(KINDS)
    return kind.__name__, kind(content, chance)


def damage_file(path: Path, chance: random.Random) -> str:
    """Damage one file in place; returns how."""
    how, content = damaged(path.read_bytes(), chance)
    path.write_bytes(content)
    return how


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in FORBIDDEN:
        _seen.append(event)


sys.addaudithook(_hook)  # for good: a hook cannot be taken away


@contextmanager
def watched() -> Iterator[list[str]]:
    """Within the block, what ran that no file may run."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        yield _seen
    finally:
        _watching = False
