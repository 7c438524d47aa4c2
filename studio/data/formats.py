"""Recognises the common layouts of chat data and turns rows and files into conversations."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.data.columns import Columns, guess_columns, messages_from, named_exactly
from studio.data.conversation import (
    Conversation,
    Message,
    canonical_json,
    canonical_line,
    checked,
    own_meta,
    role_order_problem,
)
from studio.data.files import ReadOptions, read_rows, scan
from studio.data.layouts import LAYOUT_COLUMNS, LAYOUTS, from_preference, from_turns, image_of, to_turns
from studio.data.rows import BadRow, RawRow, kind_of, place, shortened
from studio.data.xtuner_maps import (
    ALIASES,
    IMAGE,
    PREFERENCE_COLUMNS,
    XTUNER_MAPS,
    XTUNER_PREFERENCE_MAPS,
    map_name,
)
from studio.errors import DataError
from studio.paths import atomic_path

__all__ = [
    "ALL_FORMATS",
    "FORMATS",
    "Conversation",
    "FormatGuess",
    "Imported",
    "Message",
    "RowProblem",
    "canonical_json",
    "import_rows",
    "read_conversations",
    "read_rows",
    "recognise",
    "role_order_problem",
    "to_conversation",
    "turns_to_conversation",
    "write_conversations",
    "write_turns",
]

FORMATS = tuple(LAYOUTS)
ALL_FORMATS = (*FORMATS, *XTUNER_MAPS, *XTUNER_PREFERENCE_MAPS)
# Formats that decode text inside a row: what comes out was not checked when the row was read.
DECODING = ("sharegpt", "question_answer", "msagent_react", "columns")
SHOWN_PROBLEMS = 20
KNOWN = (
    'Known are rows with "messages", "conversation", "conversations", "instruction" and "output", "prompt" and '
    '"completion", "chosen" and "rejected", "text", or columns named like a question and an answer.'
)
ALIKE_HINT = (
    "Read the rows as another format, or by other columns (--format, or --columns question=…,answer=… in the shell)."
)
COLUMNS_HINT = "In the shell: --columns question=…,answer=…, with the names of its columns."


@dataclass(frozen=True)
class FormatGuess:
    """The layout of a sample of rows (None when it is none we know), how sure that is (0 to 1), and why."""

    name: str | None
    confidence: float
    reason: str


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used; `where` is 'row 3' or 'row 3 (line 5)'."""

    row: int
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Imported:
    """Good rows of a file and the problems of the others; conversation i stood in row `row_numbers[i]`."""

    conversations: list[Conversation]
    problems: list[RowProblem]
    row_numbers: list[int]


class NotRecognised(BadRow):
    """Nothing says which format the row is in."""


class LeftOut(BadRow):
    """The row is fine, and the format leaves it out on purpose."""


def recognise(rows: Sequence[object]) -> FormatGuess:
    """Tell the layout of a sample of rows by their keys and texts. Never raises."""
    if not rows:
        return FormatGuess(None, 0.0, "there are no rows to look at.")
    guesses = [_layout(row) for row in rows]
    names = Counter(guess.name for guess in guesses)
    name, count = names.most_common(1)[0]
    first = next(guess for guess in guesses if guess.name == name)
    if name is None or count == len(rows):
        return first
    reason = f"{first.reason} {count} of {len(rows)} rows looked at are like that."
    return FormatGuess(name, round(first.confidence * count / len(rows), 3), reason)


def _layout(row: object) -> FormatGuess:
    if not isinstance(row, dict):
        return FormatGuess(None, 0.0, f"a row must be an object, this one is {kind_of(row)}. {KNOWN}")
    if "chosen" in row and "rejected" in row:
        return FormatGuess("preference", 0.95, 'it has "chosen" and "rejected".')
    if isinstance(row.get("messages"), list):
        return FormatGuess("messages", 1.0, 'it has a list "messages".')
    if isinstance(row.get("conversation"), list):
        return FormatGuess("xtuner", 1.0, 'it has a list "conversation".')
    if isinstance(row.get("conversations"), list):
        return _spoken_layout(row)
    if "instruction" in row and "output" in row:
        return FormatGuess("instruction", 0.95, 'it has "instruction" and "output", as Alpaca has.')
    if "instruction_zh" in row and "output_zh" in row:
        return FormatGuess("alpaca_zh", 0.95, 'it has "instruction_zh" and "output_zh".')
    if "prompt" in row and "completion" in row:
        return FormatGuess("prompt_completion", 0.95, 'it has "prompt" and "completion".')
    return _layout_by_columns(row)


def _spoken_layout(row: dict[str, Any]) -> FormatGuess:
    first = next((turn for turn in row["conversations"] if isinstance(turn, dict)), {})
    if "role" in first:
        return FormatGuess("messages", 0.95, 'it has a list "conversations" of role and content.')
    if isinstance(row.get("image"), str) and IMAGE in str(first.get("value", "")):
        return FormatGuess("llava", 0.95, f'it has "image", and its first question holds {IMAGE}.')
    return FormatGuess("sharegpt", 0.95, 'it has a list "conversations".')


def _layout_by_columns(row: dict[str, Any]) -> FormatGuess:
    if columns := guess_columns(row):
        sure = (0.9 if len(row) == 2 else 0.7) if named_exactly(columns) else 0.5
        reason = f"column {columns.question!r} is named like a question and {columns.answer!r} like an answer."
        return FormatGuess("question_answer", sure, reason)
    text = row.get("text")
    if isinstance(text, str) and "### Human:" in text and "### Assistant:" in text:
        return FormatGuess("oasst1", 0.9, 'its "text" holds ### Human: and ### Assistant:.')
    if isinstance(text, str):
        return FormatGuess("text", 0.9 if len(row) == 1 else 0.6, 'it has "text" and no question.')
    keys = ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"
    return FormatGuess(
        None,
        0.0,
        f"its keys are {keys}. {KNOWN} Or say which column is the question and which the answer.",
    )


def to_conversation(row: object, format: str | None, row_number: int, columns: Columns | None = None) -> Conversation:
    """Turn a row of the given format (None: recognise it) into a conversation. DataError names the row.

    `columns` say by hand which column is what, and go before a format.
    """
    require_format(format)
    try:
        return _convert(row, format, columns)
    except NotRecognised as bad:
        raise DataError(f"row {row_number}: {bad}", COLUMNS_HINT) from None
    except BadRow as bad:
        raise DataError(f"row {row_number}: {bad}", "Correct the row, or leave it out.") from None


def turns_to_conversation(turns: Sequence[dict[str, Any]]) -> Conversation:
    """XTuner's turns as a conversation. Raises DataError."""
    try:
        return checked(*from_turns(turns))
    except BadRow as bad:
        raise DataError(f"The turns cannot be used: {bad}", "Correct the row, or leave it out.") from None


def convert_rows(
    rows: Iterable[RawRow], format: str | None = None, columns: Columns | None = None
) -> Iterator[tuple[RawRow, Conversation | RowProblem]]:
    """Each row with its conversation or what is wrong with it; rows that the format leaves out are left out."""
    require_format(format)
    for raw in rows:
        try:
            if raw.problem:
                raise BadRow(raw.problem)
            yield raw, _convert(raw.value, format, columns, fresh=False)
        except LeftOut:
            continue
        except BadRow as bad:
            yield raw, RowProblem(raw.number, place(raw), str(bad))


def import_rows(
    path: Path, format: str | None = None, columns: Columns | None = None, options: ReadOptions | None = None
) -> Imported:
    """Read a whole file and keep the good rows beside the problems of the bad ones.

    Raises DataError only when the file as a whole cannot be read.
    """
    imported = Imported([], [], [])
    for raw, result in convert_rows(scan(path, options), format, columns):
        if isinstance(result, RowProblem):
            imported.problems.append(result)
        else:
            imported.conversations.append(result)
            imported.row_numbers.append(raw.number)
    return imported


def read_conversations(
    path: Path, format: str | None = None, columns: Columns | None = None, options: ReadOptions | None = None
) -> list[Conversation]:
    """All rows of a file as conversations; one DataError lists every row that cannot be used."""
    imported = import_rows(path, format, columns, options)
    if imported.problems:
        total = len(imported.problems) + len(imported.conversations)
        alike = not imported.conversations and len({problem.message for problem in imported.problems}) == 1
        raise bad_rows(Path(path).name, imported.problems, len(imported.problems), total, alike)
    return imported.conversations


def bad_rows(
    name: str, problems: Sequence[RowProblem], num_problems: int, total: int, all_alike: bool = False
) -> DataError:
    """The error that lists the first rows that cannot be used; `all_alike`: every row, for the same reason."""
    if all_alike and total > 1:
        why = f"all {total} rows: {problems[0].message}"
        return DataError(f"{name}: {num_problems} of {total} rows cannot be used:\n  - {why}\n", ALIKE_HINT)
    shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = num_problems - SHOWN_PROBLEMS
    tail = f"\n  and {more} more" if more > 0 else ""
    message = f"{name}: {num_problems} of {total} rows cannot be used:\n{shown}{tail}\n"
    return DataError(message, "Correct these rows, or import the good ones only (--keep-good in the shell).")


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write the canonical data file; what stood there stays until the new one is complete."""
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        file.writelines(map(canonical_line, conversations))


def write_turns(path: Path, conversations: Iterable[Conversation]) -> int:
    """Write rows in XTuner's own layout, which needs no map there; the number of rows. Raises DataError for a row that
    has no such form; what stood there stays."""
    count = 0
    with atomic_path(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, conversation in enumerate(conversations, start=1):
            try:
                row = {"conversation": to_turns(conversation)}
            except BadRow as bad:
                raise DataError(f"row {count}: {bad}", "Leave such rows out of what XTuner is to train on.") from None
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def columns_of_formats() -> dict[str, tuple[str, ...]]:
    """Every format with the columns that it reads; a ? marks one that may be missing."""
    maps = {name: each.columns for name, each in XTUNER_MAPS.items()}
    return LAYOUT_COLUMNS | maps | PREFERENCE_COLUMNS


def require_format(format: str | None) -> None:
    """Raises DataError for the name of no format."""
    if format is not None and format not in ALL_FORMATS and format not in ALIASES:
        raise DataError(f"Unknown format {format!r}.", f"Allowed: {', '.join(ALL_FORMATS)}.")


def _convert(row: object, format: str | None, columns: Columns | None, fresh: bool = True) -> Conversation:
    """`fresh` False: the row comes from a reader, and has no text that could not be stored."""
    if not isinstance(row, dict):
        raise BadRow(f"the format is not recognised: {_layout(row).reason}")
    name = "columns" if columns else map_name(format or "") or _recognised(row)
    messages, meta = _converted(row, name, columns)
    meta = own_meta(row) | meta
    return checked(messages, meta, decoded=fresh or name in DECODING)


def _recognised(row: dict[str, Any]) -> str:
    guess = _layout(row)
    if guess.name is None:
        raise NotRecognised(f"the format is not recognised: {guess.reason}")
    return guess.name


def _converted(row: dict[str, Any], name: str, columns: Columns | None) -> tuple[list[Message], dict[str, Any]]:
    if columns:
        return messages_from(row, columns), {}
    if name in LAYOUTS:
        return LAYOUTS[name](row)
    if name in XTUNER_PREFERENCE_MAPS:
        return from_preference(XTUNER_PREFERENCE_MAPS[name](row))
    turns = XTUNER_MAPS[name].convert(row)
    if not turns:
        raise LeftOut(f"XTuner's map {name!r} leaves this row out: {shortened(row)}")
    messages, meta = from_turns(turns)
    return messages, meta | image_of(row) if name.startswith("llava") else meta
