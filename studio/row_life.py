"""The life of one row by the trainer's own functions: conversation, rendered text, tokens and which are trained."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from studio import datasets
from studio.data.columns import Columns
from studio.data.conversation import Conversation
from studio.data.files import ReadOptions, scan
from studio.data.formats import to_conversation, turns_to_conversation
from studio.data.named import load_template
from studio.data.raw_rows import MORE, RawRows, shortened_cells
from studio.data.row_index import RowIndex
from studio.data.rows import BadRow, RawRow, place
from studio.data.tokens import IGNORE_INDEX, TextTokenizer, encode_conversation, rendered
from studio.data.xtuner_maps import XTUNER_MAPS, map_name
from studio.errors import DataError
from studio.models import require
from studio.paths import typed_path
from studio.projects import Project
from studio.store.datasets import Dataset

BROKEN = "\ufffd"
BUILT, EDITED, NOT_KEPT = "built", "edited", "not kept"


@dataclass(frozen=True)
class TokenView:
    """One token of a row: its text, its id, and whether the loss counts it."""

    text: str
    id: int
    trained: bool


@dataclass(frozen=True)
class RawPart:
    """The raw row: as it stands in `source`, the name of a file, a folder or a hub's data set.

    `rows` are the first of `num_rows` that became this very conversation. Without one `missing` says why: BUILT (by the
    studio, from no source), EDITED (since it was imported), NOT_KEPT (imported by an earlier release).
    """

    source: str = ""
    rows: tuple[RawRow, ...] = ()
    num_rows: int = 0
    missing: str = ""


@dataclass(frozen=True)
class RowLife:
    """What becomes of one row. `row` counts from 1; `text` is what the template writes, with nothing cut off.

    `tokens` are those that are read in training, `kept_text` is what they decode to; `cut_off` are those beyond the
    longest length, the first `View.most_cut` of `num_cut`. `turns`: as the XTuner map gave them, None without one. A
    row that its map leaves out has neither messages nor tokens.
    """

    row: int
    conversation: Conversation
    text: str
    kept_text: str
    tokens: list[TokenView]
    cut_off: list[TokenView]
    turns: list[dict[str, Any]] | None = None
    raw: RawPart = RawPart()
    num_cut: int = 0

    @property
    def truncated(self) -> bool:
        return bool(self.num_cut)

    @property
    def num_trained_tokens(self) -> int:
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class View:
    """How a row is looked at: the folder of tokenizer and template, a template's name ("": the tokenizer's own).

    `max_length` None cuts nothing off; of what is cut off, `most_cut` tokens are looked at: a cell of ten megabytes has
    millions.
    """

    model_folder: Path
    template: str = ""
    max_length: int | None = None
    loss_on: str = "assistant"
    most_cut: int = 2_000


def of_dataset(project: Project, name: str, row: int, view: View) -> RowLife:
    """The life of row `row` of a project's dataset. Raises DataError, naming the rows there are."""
    dataset = datasets.get(project, name)
    rows = RowIndex(project.path(dataset.path))
    if not 1 <= row <= len(rows):
        raise DataError(f"Dataset {name!r} has no row {row}.", f"Its rows are 1 to {len(rows)}.")
    conversation = rows.row(row)
    return replace(of_conversation(conversation, row, view), raw=raw_of(project, dataset, conversation))


def raw_of(project: Project, dataset: Dataset, conversation: Conversation) -> RawPart:
    """The raw row of a dataset's row. Raises DataError when what was kept of it is damaged."""
    origin = dataset.origin
    source = str(origin.get("file") or origin.get("hub") or "")
    if dataset.kind != "import":
        return RawPart(missing=BUILT)
    if not origin.get("raw"):
        return RawPart(source, missing=NOT_KEPT)
    found = RawRows(project.path(str(origin["raw"]))).find(conversation)
    return RawPart(source, found.rows, found.num_rows, "" if found.rows else EDITED)


def of_file(
    path: Path, row: int, view: View, format: str = "", options: ReadOptions | None = None, columns: str = ""
) -> RowLife:
    """The life of row `row` of any file that can be imported. Raises DataError.

    `format` "" recognises it; `columns` (question=…,answer=…) say by hand which is what, and go before a format.
    """
    by_hand = Columns.parse(columns) if columns else None
    raw = _raw_row(path, row, options)
    return replace(_of_raw(path, row, raw, view, format, by_hand), raw=RawPart(path.name, (raw,), 1))


def _of_raw(path: Path, row: int, raw: RawRow, view: View, format: str, columns: Columns | None) -> RowLife:
    known = None if columns else XTUNER_MAPS.get(map_name(format))
    if known is None:
        return of_conversation(to_conversation(raw.value, format or None, row, columns), row, view)
    try:
        turns = known.convert(raw.value)
    except BadRow as bad:
        raise DataError(f"{path.name}, {place(raw)}: {bad}", f"Check that its rows suit the map {format!r}.") from None
    if not turns:
        return RowLife(row, Conversation(()), "", "", [], [], turns)
    return of_conversation(turns_to_conversation(turns), row, view, turns)


def of_conversation(
    conversation: Conversation, row: int, view: View, turns: list[dict[str, Any]] | None = None
) -> RowLife:
    """The life of a conversation at hand. Raises DataError when it cannot be written or tokenised."""
    template, tokenizer = load_template(view.template, view.model_folder), TextTokenizer.load(view.model_folder)
    example = encode_conversation(conversation, template, tokenizer, None, view.loss_on)
    end = len(example.input_ids) if example.is_document else view.max_length
    looked_at = None if end is None else end + view.most_cut
    ids, labels = example.input_ids[:looked_at], example.labels[:looked_at]
    pieces = zip(tokenizer.pieces(ids), ids, labels, strict=True)
    tokens = [TokenView(text, id, label != IGNORE_INDEX) for text, id, label in pieces]
    text = rendered(conversation, template, tokenizer)
    kept = tokenizer.decode(example.input_ids[:end])
    cut_off = tokens[end:] if end else []
    num_cut = len(example.input_ids) - end if cut_off and end else 0
    return RowLife(row, conversation, text, kept, tokens[:end], cut_off, turns, num_cut=num_cut)


def raw_text(row: RawRow, more: str = MORE) -> str:
    """A raw row to read; `more` says of a long cell how many characters ({number}) are not shown."""
    return json.dumps(shortened_cells(row.value, more), ensure_ascii=False, indent=2)


def model_folder(tokenizer: str, base: str, project: Project | None) -> Path:
    """Where tokenizer and template are read from: a folder of its own, a base model, the project's, the starter's."""
    if not tokenizer:
        return require(base or (project.base if project else "starter"))
    folder = typed_path(tokenizer)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{tokenizer!r} is no folder with a tokenizer.json.", "Give the folder of a model or tokenizer."
        )
    return folder


def _raw_row(path: Path, row: int, options: ReadOptions | None) -> RawRow:
    """The row by its place in the whole source, counted from 1."""
    seen = deque(enumerate(islice(scan(path, options), row), start=1), maxlen=1)
    number, found = seen[0] if seen else (0, None)
    if found is None or number < row:
        raise DataError(f"{path.name} has no row {row}.", f"It has {number} rows.")
    if found.problem:
        raise DataError(f"{path.name}, {place(found)}: {found.problem}", "Correct the row, or look at another.")
    return found


@dataclass(frozen=True)
class Chip:
    """Neighbouring tokens that are shown as one: those that only together make a character."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    cut: bool = False  # beyond the longest length: it is not read at all
    control: bool = False  # a control token of the tokenizer, and no text that only looks like one

    @property
    def kind(self) -> str:
        """The class it is shown as."""
        return "cut" if self.cut else "trained" if self.trained else "masked"


def chips(tokens: Sequence[TokenView], decode: Callable[[list[int]], str]) -> list[Chip]:
    """One chip a token, except where a character is spread over several; `decode` turns ids into text."""
    result: list[Chip] = []
    part: list[TokenView] = []
    for token in tokens:
        if not part and BROKEN not in token.text:
            result.append(Chip(token.text, (token.id,), token.trained))
            continue
        part.append(token)
        text = decode([each.id for each in part])
        if BROKEN not in text or len(part) >= 8:
            result.append(_chip(text, part))
            part = []
    return [*result, _chip(decode([each.id for each in part]), part)] if part else result


def _chip(text: str, part: list[TokenView]) -> Chip:
    return Chip(text, tuple(each.id for each in part), any(each.trained for each in part))


def chips_of(life: RowLife, model_folder: Path) -> list[Chip]:
    """A row's tokens to look at, those beyond the longest length marked as cut."""
    tokenizer = TextTokenizer.load(model_folder)
    cut = [replace(chip, cut=True) for chip in chips(life.cut_off, tokenizer.decode)]
    found = chips(life.tokens, tokenizer.decode) + cut
    return [replace(chip, control=True) if tokenizer.control_ids.issuperset(chip.ids) else chip for chip in found]
