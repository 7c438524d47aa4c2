"""A dataset's rows as a table, a page at a time: find, read, edit, delete. A million rows are opened as quickly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import streamlit as st

from studio import datasets
from studio.data.conversation import Conversation
from studio.data.row_index import RowIndex
from studio.datasets import Dataset
from studio.projects import Project
from studio.ui import state
from studio.ui.data_build import intent_word
from studio.ui.i18n import _, ngettext

PAGE_ROWS = 25
MOST_FOUND = 5_000
SHOWN_CHARACTERS = 2_000  # of a cell: ten megabytes in one would stop the browser


def open_rows(project: Project, dataset: Dataset) -> RowIndex:
    """The rows by number. Raises DataError when the file is damaged."""
    return _open_rows(str(project.path(dataset.path)), dataset.fingerprint)


@st.cache_resource(max_entries=8, show_spinner=False)
def _open_rows(path: str, fingerprint: str) -> RowIndex:
    return RowIndex(path)


def choose_rows(rows: RowIndex, dataset: Dataset) -> Sequence[int]:
    """Numbers of the rows on the page that is looked at, among those with the words looked for."""
    words = st.text_input(
        _("Find"), key="data.browse.find", placeholder=_("Find in questions and answers"), icon=":material/search:",
        label_visibility="collapsed",
    )  # fmt: skip
    found: Sequence[int] = range(1, len(rows) + 1)
    if words.strip():
        found = list(islice(rows.find(words), MOST_FOUND + 1))
    return _one_page(found[:MOST_FOUND] if words.strip() else found, dataset, cut=len(found) > MOST_FOUND < len(rows))


def _one_page(numbers: Sequence[int], dataset: Dataset, cut: bool) -> Sequence[int]:
    num_pages = max(1, -(-len(numbers) // PAGE_ROWS))
    page = 1
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        told = ngettext("{number} row found", "{number} rows found", len(numbers)).format(number=f"{len(numbers):,}")
        st.caption(told + (f" · {_('the first ones only')}" if cut and isinstance(numbers, list) else ""))
        if num_pages > 1:
            page = st.pagination(num_pages, key=f"data.browse.page.{dataset.name}.{num_pages}")
    return numbers[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]


def table(project: Project, dataset: Dataset, rows: RowIndex, numbers: Sequence[int]) -> None:
    """The rows of one page. Edits are stored when Save is pressed, as a new version."""
    if not numbers:
        return
    key = f"data.browse.table.{dataset.name}.{dataset.fingerprint[:12]}.{numbers[0]}.{numbers[-1]}.{len(numbers)}"
    import pandas as pd  # half a second: only for who looks at a table

    shown = rows.rows(numbers)
    frame = pd.DataFrame([_cells(number, row) for number, row in zip(numbers, shown, strict=True)])
    st.data_editor(
        frame, key=key, hide_index=True, num_rows="delete", height="content", row_height=32,
        disabled=["row", "turns", "intent"],
        column_config={
            "row": st.column_config.NumberColumn(_("Row"), width="small"),
            "question": st.column_config.TextColumn(_("Question"), width="medium"),
            "answer": st.column_config.TextColumn(_("Answer"), width="large"),
            "turns": st.column_config.NumberColumn(_("Turns"), width="small"),
            "intent": st.column_config.TextColumn(_("Intent"), width="small"),
        },
    )  # fmt: skip
    edits = st.session_state.get(key) or {}
    _save_edits(project, dataset, rows, numbers, edits.get("edited_rows", {}), edits.get("deleted_rows", []))


def _save_edits(
    project: Project,
    dataset: Dataset,
    rows: RowIndex,
    numbers: Sequence[int],
    changed: Mapping[int, Mapping[str, str]],
    deleted: Sequence[int],
) -> None:
    if len(deleted) == len(rows):
        st.warning(_("A dataset needs at least one row. To be rid of all of them, delete the dataset above."))
        return
    if any(_is_cut(rows.row(numbers[int(index)]), cells) for index, cells in changed.items()):
        st.warning(_("A cell this long is shown in part and cannot be edited here."))
        return
    if not (changed or deleted):
        return
    label = _("Save {changed} changed and {deleted} deleted rows").format(changed=len(changed), deleted=len(deleted))
    if st.button(label, type="primary", icon=":material/save:", key="data.browse.save"):
        made_by = _edit_words(numbers, changed, deleted)
        edited = with_edits(rows, numbers, changed, deleted)
        datasets.save(project, dataset.name, edited, made_by=made_by, expected_version=dataset.version)
        state.flash(_("Saved."))
        st.rerun()


def _edit_words(numbers: Sequence[int], changed: Iterable[int], deleted: Iterable[int]) -> str:
    """What the list of versions says; English, as all of it."""
    parts = [
        f"{verb} {', '.join(str(numbers[int(index)]) for index in rows)}"
        for verb, rows in (("edited row", list(changed)), ("deleted row", list(deleted)))
        if rows
    ]
    return "; ".join(parts)


def _cells(number: int, row: Conversation) -> dict[str, Any]:
    turns = [message for message in row.messages if message.role != "system"]
    return {
        "row": number,
        "question": turns[-2].content[:SHOWN_CHARACTERS] if len(turns) > 1 else "",
        "answer": turns[-1].content[:SHOWN_CHARACTERS],
        "turns": sum(message.role == "user" for message in turns),
        "intent": intent_word(str(row.meta.get("intent", ""))),
    }


def _is_cut(row: Conversation, cells: Mapping[str, str]) -> bool:
    """Whether an edited cell showed only the beginning of its text."""
    places = {"question": -2, "answer": -1}
    return any(len(row.messages[places[name]].content) > SHOWN_CHARACTERS for name in cells if name in places)


def with_edits(
    rows: Iterable[Conversation],
    numbers: Sequence[int],
    changed: Mapping[int, Mapping[str, str]],
    deleted: Sequence[int],
) -> Iterator[Conversation]:
    """The rows after edits of a table that showed `numbers`: the last question and answer changed, rows deleted."""
    gone = {numbers[int(index)] for index in deleted}
    edited = {numbers[int(index)]: cells for index, cells in changed.items()}
    for number, row in enumerate(rows, start=1):
        if number not in gone:
            yield _edited(row, edited[number]) if number in edited else row


def _edited(row: Conversation, cells: Mapping[str, str]) -> Conversation:
    messages = list(row.messages)
    for name, place in (("question", -2), ("answer", -1)):
        if name in cells and len(messages) >= -place:
            messages[place] = replace(messages[place], content=cells[name] or "")
    return replace(row, messages=tuple(messages))
