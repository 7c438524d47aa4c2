"""Data page, tab Upload: a file of chats, what it was recognised as, what is wrong with it by row, and taking it in."""

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import streamlit as st

from studio import datasets
from studio.data.files import SUFFIXES, scan
from studio.data.formats import FORMATS, FormatGuess, Imported, import_rows, recognise
from studio.errors import DataError
from studio.paths import slugify
from studio.projects import Project
from studio.ui import state
from studio.ui.data_build import preview_columns, preview_row
from studio.ui.i18n import _, ngettext
from studio.ui.widgets import guarded, plain

SHOWN_ROWS = 12
SAMPLE_ROWS = 100
SHOWN_PROBLEMS = 200
LAYOUT_WORDS = {
    "messages": "OpenAI messages",
    "xtuner": "XTuner conversation",
    "instruction": "Alpaca",
    "sharegpt": "ShareGPT",
    "prompt_completion": "prompt, completion",
    "question_answer": "question, answer",
    "preference": "prompt, chosen, rejected",
    "text": "text",
}


@dataclass(frozen=True)
class Upload:
    """A file as it was uploaded, with what a look at all of its rows found."""

    file_name: str
    content: bytes
    guess: FormatGuess
    imported: Imported


def upload_tab(project: Project) -> None:
    """Nothing is stored before the button is pressed."""
    left, right = st.columns([5, 6], gap="large")
    with left:
        file = st.file_uploader(
            _("A JSON or JSONL file"), ["json", "jsonl"], key="data.upload.file",
            help=_("OpenAI messages, XTuner conversation, Alpaca or ShareGPT; recognised by its keys."),
        )  # fmt: skip
        layout = st.selectbox(
            _("Layout"), ["", *FORMATS], key="data.upload.layout",
            format_func=lambda name: LAYOUT_WORDS[name] if name else _("recognise it"),
        )  # fmt: skip
    if file is None:
        right.info(
            _("Each row must hold a question and an answer, or a longer conversation."), icon=":material/upload_file:"
        )
        return
    with guarded():
        upload = _read(file, layout)
        with left:
            _take_in(project, upload, layout)
        with right:
            _findings(upload)


def _read(file: Any, layout: str) -> Upload:
    """Read and convert the file once, not at every rerun."""
    mark = (file.file_id, layout)
    known = st.session_state.get("data.upload.read")
    if known is None or known[0] != mark:
        with st.spinner(_("Reading…")):
            known = (mark, read_upload(file.name, file.getvalue(), layout))
        st.session_state["data.upload.read"] = known
    return known[1]


def read_upload(file_name: str, content: bytes, layout: str = "") -> Upload:
    """What is in an uploaded file. Raises DataError when it cannot be read as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = _written(Path(folder), file_name, content)
        sample = [row.value for row in islice(scan(path), SAMPLE_ROWS) if not row.problem]
        if not sample:
            raise DataError(f"{file_name} holds no row that can be read.", "Choose another file, or mend this one.")
        return Upload(file_name, content, recognise(sample), import_rows(path, layout or None))


def _written(folder: Path, file_name: str, content: bytes) -> Path:
    """The content under a harmless name that is still recognisable."""
    name = Path(file_name)
    suffix = "".join(part.lower() for part in name.suffixes[-2:] if part.lower() in (*SUFFIXES, ".gz")) or ".json"
    path = folder / (slugify(name.stem) + suffix)
    path.write_bytes(content)
    return path


def _take_in(project: Project, upload: Upload, layout: str) -> None:
    good, bad = len(upload.imported.conversations), len(upload.imported.problems)
    name = st.text_input(
        _("Name of the dataset"), slugify(Path(upload.file_name).stem), key=f"data.upload.name.{upload.file_name}"
    )
    keep_good = False
    if bad and good:
        keep_good = st.checkbox(_("Leave out the rows that cannot be used"), key="data.upload.keep")
    if name in {dataset.name for dataset in datasets.listed(project)}:
        st.warning(_("This replaces the dataset {name}.").format(name=plain(name)))
    label = ngettext("Import {number} row", "Import {number} rows", good).format(number=good)
    blocked = not good or bool(bad and not keep_good)
    if st.button(label, type="primary", icon=":material/download_done:", disabled=blocked, key="data.upload.go"):
        with guarded():
            _import(project, upload, name.strip(), layout, keep_good)


def _import(project: Project, upload: Upload, name: str, layout: str, keep_good: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _written(Path(folder), upload.file_name, upload.content)
        dataset = datasets.import_file(project, path, name, layout or None, keep_good)
    words = ngettext(
        "Dataset {name}: {number} row imported.", "Dataset {name}: {number} rows imported.", dataset.num_rows
    )
    state.flash(words.format(name=plain(dataset.name), number=dataset.num_rows))
    state.keep("data.dataset", dataset.name)
    st.rerun()


def _findings(upload: Upload) -> None:
    good, bad = upload.imported.conversations, upload.imported.problems
    name = LAYOUT_WORDS.get(upload.guess.name or "", _("not recognised"))
    st.markdown(f"**{_('Layout')}: {name}** · {plain(upload.guess.reason)}")
    st.markdown(_("{good} rows can be used, {bad} cannot.").format(good=len(good), bad=len(bad)))
    if bad:
        st.dataframe(
            [{"row": problem.row, "problem": problem.message} for problem in bad[:SHOWN_PROBLEMS]],
            hide_index=True, height="content" if len(bad) < 8 else 260,
            column_config={
                "row": st.column_config.NumberColumn(_("Row"), width="small"),
                "problem": st.column_config.TextColumn(_("What is wrong"), width="large"),
            },
        )  # fmt: skip
    if good:
        rows = [preview_row(conversation) for conversation in good[:SHOWN_ROWS]]
        st.dataframe(rows, hide_index=True, column_config=preview_columns(), height="content")
