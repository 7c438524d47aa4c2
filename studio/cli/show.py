"""What the shell shows: sentences, tables, JSON. Colours only on a terminal; whatever a cell holds is shown as text."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from itertools import islice
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)
_wide = Console(soft_wrap=True, width=10_000)


def say(text: str) -> None:
    """One line or more, as it is."""
    out.print(plain(text), highlight=False)


def fail(text: str) -> None:
    """An error: on stderr, in red on a terminal."""
    err.print(Text.assemble(("error: ", "red"), plain(text)), highlight=False)


def note(text: str) -> None:
    """What goes on meanwhile, and is no result: on stderr, so that a pipe gets answers alone."""
    err.print(plain(text), style="bright_black", highlight=False)


def warn(text: str) -> None:
    """What a person should know before going on: on stderr, in yellow on a terminal."""
    err.print(Text.assemble(("warning: ", "yellow"), plain(text)), highlight=False)


def waiting(items: Iterable[Item], text: str) -> Iterator[Item]:
    """The items; a terminal shows `text`, turning, until the first one comes."""
    rest = iter(items)
    with err.status(plain(text)):
        first = list(islice(rest, 1))
    yield from first
    yield from rest


def amount(number: int, word: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def plain(value: Any) -> Text:
    """Any value as text: no markup, and no control characters that would drive a terminal."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Text(text)


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table without frames, for a terminal or for a live view."""
    view = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        view.add_row(*(plain(cell) for cell in row))
    return view


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table. A pipe gets each row on one line, however long."""
    (out if out.is_terminal else _wide).print(grid(columns, rows))


def as_json(value: Any) -> None:
    """Print a value, dataclasses included, as JSON."""
    print(json.dumps(value, default=_encoded, ensure_ascii=False, indent=2))


def _encoded(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def drop_output() -> None:
    """Nobody reads stdout any more: let the interpreter's last flush go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
