"""What was asked of a model server: who, when, how many tokens, how long, and how it ended. Never the words, unless the
server was started to keep them. One JSON object a line, in files of the server's job that only their owner can read."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "requests.jsonl"
OLDER_FILE = "requests.1.jsonl"
MAX_BYTES = 4_000_000  # of one file; the one before is kept, older ones are not
MAX_WHO = 80


@dataclass(frozen=True)
class Asked:
    """One answered request, or one column of a comparison.

    `at`: UTC, ISO text. `who`: the request's `user`, else what its client calls itself. `first_seconds`: until the
    first text, None when there was none. `end`: stop, length, cancelled or error. Words are "" unless kept.
    """

    at: str
    who: str
    model: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    first_seconds: float | None
    end: str
    error: str = ""
    prompt: str = ""
    answer: str = ""


class RequestLog:
    """Appends to the file of a job; the words are kept when `keeps_words`."""

    def __init__(self, folder: Path, keeps_words: bool = False) -> None:
        self._path, self._older = folder / FILE, folder / OLDER_FILE
        self.keeps_words = keeps_words
        self.num_asked = 0

    def add(self, asked: Asked) -> None:
        """One line more. Raises OSError when the disk is full."""
        values = {key: value for key, value in asdict(asked).items() if value != ""}
        values["who"] = asked.who[:MAX_WHO]
        if not self.keeps_words:
            values = {key: value for key, value in values.items() if key not in ("prompt", "answer")}
        line = json.dumps(values, ensure_ascii=False) + "\n"
        if self._path.is_file() and self._path.stat().st_size + len(line) > MAX_BYTES:
            self._path.replace(self._older)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(line)
        self.num_asked += 1


def read(folder: Path, limit: int = 200) -> list[Asked]:
    """The last requests of a server's job, the newest first; lines that cannot be read are left out."""
    found: list[Asked] = []
    for name in (FILE, OLDER_FILE):
        if len(found) < limit and (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").split("\n")
            found += _parsed(reversed(lines))
    return found[:limit]


def _parsed(lines: Iterator[str]) -> Iterator[Asked]:
    for line in lines:
        try:
            values: dict[str, Any] = json.loads(line)
            yield Asked(**values)
        except (ValueError, TypeError):
            continue  # cut off when a process ended, or written by another version
