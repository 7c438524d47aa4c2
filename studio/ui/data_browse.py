"""Data page, tab Browse: rows in a table to edit, what the lint says, and the life of one row down to its tokens."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from studio import dataset_checks, datasets, models
from studio.data.formats import Conversation
from studio.data.lint.findings import Finding
from studio.data.tokens import TextTokenizer
from studio.datasets import Dataset
from studio.errors import StudioError
from studio.projects import Project
from studio.row_life import RowLife, View, of_conversation
from studio.ui import state
from studio.ui.data_build import dataset_line, intent_word
from studio.ui.i18n import N_, _, ngettext
from studio.ui.token_view import Chip, chips, token_view
from studio.ui.widgets import ago, guarded, plain, show_error

PAGE_ROWS = 25
LINT_LIMIT = 20_000
SHOWN_FINDINGS = 500
KIND_WORDS = {
    "identity": N_("identity"),
    "general": N_("general"),
    "tutorial": N_("tutorial"),
    "import": N_("imported"),
}


def browse_tab(project: Project) -> None:
    """Edits are stored when Save is pressed; the uploaded source file is never touched."""
    there = datasets.listed(project)
    if not there:
        st.info(_("No dataset yet. Build one in the first tab, or upload a file."), icon=":material/inbox:")
        return
    dataset = _pick(there)
    _headline(project, dataset)  # first: a dataset that cannot be read can be deleted
    rows = _rows(str(project.path(dataset.path)), dataset.fingerprint, project, dataset.name)
    shown = _filtered(rows)
    table, detail = st.columns([3, 2], gap="large")
    with table:
        numbers = _one_page(shown, dataset)
        with guarded():
            _table(project, dataset, rows, numbers)
        with guarded():
            _findings(project, dataset)
    with detail, guarded():
        _life(project, dataset, rows, numbers)


def _pick(there: list[Dataset]) -> Dataset:
    names = [dataset.name for dataset in there]
    chosen = state.kept("data.dataset")
    name = st.segmented_control(
        _("Dataset"), names, default=chosen if chosen in names else names[0], required=True,
        key=f"data.browse.pick.{'.'.join(names)}.{chosen}", label_visibility="collapsed",
    )  # fmt: skip
    return next(dataset for dataset in there if dataset.name == name)


@st.cache_data(max_entries=4, show_spinner=False)
def _rows(path: str, fingerprint: str, _project: Project, name: str) -> list[Conversation]:
    return datasets.load(_project, name)


def _headline(project: Project, dataset: Dataset) -> None:
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        kind = _(KIND_WORDS.get(dataset.kind, dataset.kind))
        edited = f" · {_('edited')}" if dataset.origin.get("edited") else ""
        st.markdown(
            f"{dataset_line(dataset)} · {kind}{edited} · {ago(dataset.created_at)} · "
            f":gray[{_('fingerprint')} {dataset.fingerprint[:12]}]"
        )
        with st.popover(_("Delete"), icon=":material/delete:", key="data.browse.delete"):
            st.markdown(_("Delete this dataset and its held-out questions? The uploaded source file stays."))
            st.button(
                _("Delete for good"), key="data.browse.delete.sure", on_click=_delete, args=(project, dataset.name)
            )


def _delete(project: Project, name: str) -> None:
    with guarded():
        datasets.delete(project, name)
        state.forget("data.dataset")
        state.flash(_("Dataset {name} is deleted.").format(name=plain(name)))


def _filtered(rows: Sequence[Conversation]) -> list[int]:
    """Numbers (from 1) of the rows that hold the words looked for."""
    words = st.text_input(
        _("Find"), key="data.browse.find", placeholder=_("Find in questions and answers"), icon=":material/search:",
        label_visibility="collapsed",
    )  # fmt: skip
    wanted = words.casefold().strip()
    return [
        number
        for number, row in enumerate(rows, start=1)
        if not wanted or any(wanted in message.content.casefold() for message in row.messages)
    ]


def _one_page(numbers: list[int], dataset: Dataset) -> list[int]:
    num_pages = max(1, -(-len(numbers) // PAGE_ROWS))
    page = 1
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.caption(ngettext("{number} row found", "{number} rows found", len(numbers)).format(number=len(numbers)))
        if num_pages > 1:
            page = st.pagination(num_pages, key=f"data.browse.page.{dataset.name}.{num_pages}")
    return numbers[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]


def _table(project: Project, dataset: Dataset, rows: list[Conversation], numbers: list[int]) -> None:
    if not numbers:
        return
    key = f"data.browse.table.{dataset.name}.{dataset.fingerprint[:12]}.{numbers[0]}.{numbers[-1]}.{len(numbers)}"
    import pandas as pd  # half a second: only for who looks at a table

    frame = pd.DataFrame([_cells(number, rows[number - 1]) for number in numbers])
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
    changed, deleted = edits.get("edited_rows", {}), edits.get("deleted_rows", [])
    if len(deleted) == len(rows):
        st.warning(_("A dataset needs at least one row. To be rid of all of them, delete the dataset above."))
    elif changed or deleted:
        label = _("Save {changed} changed and {deleted} deleted rows").format(
            changed=len(changed), deleted=len(deleted)
        )
        if st.button(label, type="primary", icon=":material/save:", key="data.browse.save"):
            datasets.save(project, dataset.name, with_edits(rows, numbers, changed, deleted))
            state.flash(_("Saved."))
            st.rerun()


def _cells(number: int, row: Conversation) -> dict[str, Any]:
    turns = [message for message in row.messages if message.role != "system"]
    return {
        "row": number,
        "question": turns[-2].content if len(turns) > 1 else "",
        "answer": turns[-1].content,
        "turns": len(turns) // 2,
        "intent": intent_word(str(row.meta.get("intent", ""))),
    }


def with_edits(
    rows: Sequence[Conversation], numbers: Sequence[int], changed: dict[int, dict[str, str]], deleted: Sequence[int]
) -> list[Conversation]:
    """The rows after edits of a table that showed `numbers`: the last question and answer changed, rows deleted."""
    result: list[Conversation | None] = list(rows)
    for index, cells in changed.items():
        number = numbers[int(index)]
        result[number - 1] = _edited(rows[number - 1], cells)
    for index in deleted:
        result[numbers[int(index)] - 1] = None
    return [row for row in result if row is not None]


def _edited(row: Conversation, cells: dict[str, str]) -> Conversation:
    messages = list(row.messages)
    for name, place in (("question", -2), ("answer", -1)):
        if name in cells:
            messages[place] = replace(messages[place], content=cells[name] or "")
    return replace(row, messages=tuple(messages))


def _findings(project: Project, dataset: Dataset) -> None:
    if dataset.num_rows > LINT_LIMIT:
        st.caption(_("The check of the rows is left to `retune data lint` for a dataset of this size."))
        return
    base = project.base if models.resolve(project.base).present else ""
    found = _lint(str(project.path(dataset.path)), dataset.fingerprint, base, project, dataset.name)
    errors = sum(finding.severity == "error" for finding in found)
    if not found:
        st.success(_("Checked: nothing is wrong with these rows."), icon=":material/check_circle:")
        return
    words = _("Checked: {errors} errors, {warnings} warnings").format(errors=errors, warnings=len(found) - errors)
    with st.expander(words, expanded=errors > 0, icon=":material/error:" if errors else ":material/warning:"):
        st.dataframe(
            [_finding_cells(finding) for finding in found[:SHOWN_FINDINGS]], hide_index=True, height=260,
            column_config={
                "row": st.column_config.NumberColumn(_("Row"), width="small"),
                "severity": st.column_config.TextColumn(_("Severity"), width="small"),
                "message": st.column_config.TextColumn(_("What is wrong"), width="large"),
            },
        )  # fmt: skip


@st.cache_data(max_entries=8, show_spinner=N_("Checking the rows…"))
def _lint(path: str, fingerprint: str, base: str, _project: Project, name: str) -> list[Finding]:
    return dataset_checks.lint_dataset(_project, name, dataset_checks.Tokens(base) if base else None).findings


def _finding_cells(finding: Finding) -> dict[str, Any]:
    severity = _("error") if finding.severity == "error" else _("warning")
    return {"row": finding.row, "severity": severity, "message": finding.message}


def _life(project: Project, dataset: Dataset, rows: list[Conversation], numbers: list[int]) -> None:
    """From the row in the file to the tokens that are trained."""
    first = numbers[0] if numbers else 1
    key = f"data.browse.row.{dataset.name}.{first}.{len(rows)}"
    number = st.number_input(
        _("The life of row"), 1, len(rows), first, key=key,
        help=_("What becomes of a row: conversation, text, tokens. The trainer uses the same functions."),
    )  # fmt: skip
    row = rows[int(number) - 1]
    for message in row.messages:
        with st.container(border=True, gap="xsmall"):
            st.caption(_role_words()[message.role])
            st.text(message.content)
    if not models.resolve(project.base).present:
        st.info(_("The tokens appear when the base model {base} is on this machine.").format(base=plain(project.base)))
    else:
        _tokens(project, dataset, row, int(number))
    with st.expander(_("The row in the file")):
        st.code(json.dumps(row.to_row(), ensure_ascii=False, indent=2), language="json", wrap_lines=True)


def _role_words() -> dict[str, str]:
    return {"system": _("System"), "user": _("Question"), "assistant": _("Answer")}


def _tokens(project: Project, dataset: Dataset, row: Conversation, number: int) -> None:
    try:
        life, shown = _row_life(dataset.fingerprint, number, project.base, row)
    except StudioError as error:
        show_error(error)
        return
    words = _("{all} tokens, {trained} of them trained").format(all=len(life.tokens), trained=life.num_trained_tokens)
    st.markdown(f"**{words}** · :green-badge[{_('trained')}] :gray-badge[{_('not trained')}]")
    token_view(shown, key=f"data.browse.tokens.{dataset.name}")
    if life.truncated:
        st.warning(_("This row is longer than the longest sequence and was cut."))
    with st.expander(_("Rendered by the chat template")):
        st.code(life.text, language=None, wrap_lines=True)


@st.cache_data(max_entries=64, show_spinner=False)
def _row_life(fingerprint: str, number: int, base: str, _row: Conversation) -> tuple[RowLife, list[Chip]]:
    folder = models.require(base)
    life = of_conversation(_row, number, View(folder, max_length=512))
    return life, chips(life.tokens, TextTokenizer.load(folder).decode)
