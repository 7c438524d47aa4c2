"""Data page, tab Upload: rows of a file, a folder or a hub; what they were recognised as, and taking them in."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import streamlit as st

from studio import datasets, jobs
from studio.data.columns import Columns, guess_columns
from studio.data.conversation import Conversation
from studio.data.files import CSV_SUFFIXES, JSON_SUFFIXES, SUFFIXES, TEXT_SUFFIXES, ReadOptions, scan, suffix_of
from studio.data.formats import (
    ALL_FORMATS,
    FormatGuess,
    Imported,
    import_rows,
    recognise,
    to_conversation,
)
from studio.data.intake import keep_source
from studio.data.rows import RawRow
from studio.data.tables import sheet_names
from studio.errors import DataError
from studio.paths import slugify, typed_path
from studio.projects import Project
from studio.ui import state
from studio.ui.data_build import preview_columns, preview_row
from studio.ui.i18n import N_, _, ngettext
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

SHOWN_ROWS = 12
SAMPLE_ROWS = 100
SHOWN_PROBLEMS = 200
BY_HAND = "by hand"
ENCODED_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *TEXT_SUFFIXES)
ENCODINGS = ("utf-8", "gb18030", "big5", "utf-16", "shift_jis", "euc_kr", "cp1251", "cp1252")
HUB_WORDS = {"hf": "Hugging Face", "modelscope": "ModelScope"}
LAYOUT_WORDS = {
    "messages": "OpenAI messages",
    "xtuner": "XTuner conversation",
    "instruction": "Alpaca",
    "sharegpt": "ShareGPT",
    "prompt_completion": "prompt, completion",
    "question_answer": N_("question, answer"),
    "preference": "prompt, chosen, rejected",
    "text": N_("text to go on with"),
}


@dataclass(frozen=True)
class Source:
    """Rows to look at: a file or folder that can be read here, and the name a person knows it by."""

    path: Path
    name: str
    mark: str
    upload: tempfile.TemporaryDirectory[str] | None = None  # goes with the session


@dataclass(frozen=True)
class Look:
    """What the first rows show; and, for a source small enough to be read whole, what every row became."""

    guess: FormatGuess
    columns: tuple[str, ...]
    sample: tuple[RawRow, ...]
    whole: Imported | None


@dataclass(frozen=True)
class Choice:
    """How rows are to be read: "" recognises each; `columns` as `Columns.to_text`."""

    layout: str = ""
    columns: str = ""
    options: ReadOptions = ReadOptions()


def upload_tab(project: Project) -> None:
    """Nothing is stored in the project before the button is pressed."""
    _under_way(project)
    left, right = st.columns([5, 6], gap="large")
    with left:
        places = {"file": _("Upload"), "path": _("On this machine"), "hub": _("From a hub")}
        place = st.segmented_control(
            _("Where the rows are"), list(places), format_func=lambda name: places[name], default="file",
            required=True, key="data.upload.place",
        )  # fmt: skip
    with guarded():
        if place == "hub":
            with left:
                _hub_form(project)
            return
        with left:
            source = _uploaded() if place == "file" else _on_this_machine()
        if source is None:
            right.info(
                _("Any rows of questions and answers, whole conversations, or plain text to go on with.")
                + " "
                + _("JSON, JSONL, CSV, TSV, Parquet, Excel, plain text or Markdown; also packed as .gz."),
                icon=":material/upload_file:",
            )
            return
        _look_and_take(project, source, left, right)


def _look_and_take(project: Project, source: Source, left: Any, right: Any) -> None:
    with left:
        options = _how_to_open(source)  # first: what cannot be read may be readable in another encoding
    first = _look(source, Choice(options=options))
    with left:
        read = _how_to_read(first)
        if read is None:
            st.caption(_("Choose the columns of the question and of the answer."))
            st.button(_("Import"), type="primary", icon=":material/download_done:", disabled=True, key="data.upload.go")
    if read is None:
        with right:
            _findings(first, Choice(options=options))
        return
    choice = replace(read, options=options)
    look = first if choice == Choice(options=options) else _look(source, choice)
    with left:
        _take_in(project, source, look, choice)
    with right:
        _findings(look, choice)


def _uploaded() -> Source | None:
    kinds = [suffix.lstrip(".") for suffix in SUFFIXES]
    file = st.file_uploader(
        _("A file of rows"), [*kinds, "gz"], key="data.upload.file",
        help=_("JSON, JSONL, CSV, TSV, Parquet, Excel, plain text or Markdown; also packed as .gz."),
    )  # fmt: skip
    if file is None:
        return None
    known: Source | None = st.session_state.get("data.upload.source")
    if known is None or known.mark != file.file_id:
        known = source_of(file.name, file.getvalue(), file.file_id)
        st.session_state["data.upload.source"] = known
    return known


def source_of(file_name: str, content: bytes, mark: str = "") -> Source:
    """Uploaded bytes as a file under a harmless name that still tells its kind."""
    folder = tempfile.TemporaryDirectory(prefix="retune-upload-")
    name = Path(file_name)
    suffix = "".join(part.lower() for part in name.suffixes[-2:] if part.lower() in (*SUFFIXES, ".gz")) or ".json"
    path = Path(folder.name) / (slugify(name.stem) + suffix)
    path.write_bytes(content)
    return Source(path, file_name, mark, folder)


def _on_this_machine() -> Source | None:
    typed = st.text_input(
        _("File or folder"), key="data.upload.path", placeholder="/data/chats.jsonl",
        help=_("A path on the machine that the studio runs on; a folder is read with all its files."),
    ).strip()  # fmt: skip
    if not typed:
        return None
    path = typed_path(typed)
    if not path.exists():
        raise DataError(f"There is no file or folder {typed!r} on this machine.", "Give its full path.")
    return Source(path, path.name, f"{path.resolve()} {path.stat().st_mtime}")


def _how_to_open(source: Source) -> ReadOptions:
    """The sheet of a workbook that has several, the encoding of text."""
    if source.path.is_file() and (sheets := sheet_names(source.path)):
        if len(sheets) < 2:
            return ReadOptions()
        return ReadOptions(sheet=st.selectbox(_("Sheet"), sheets, key=f"data.upload.sheet.{source.mark}"))
    if suffix_of(source.path) not in ENCODED_SUFFIXES:
        return ReadOptions()
    encoding = st.selectbox(
        _("Encoding"), ["", *ENCODINGS], key=f"data.upload.encoding.{source.mark}",
        format_func=lambda name: name or _("recognise it"),
        help=_("Choose one when the text of the rows looks garbled."),
    )  # fmt: skip
    return ReadOptions(encoding=encoding)


def _look(source: Source, choice: Choice) -> Look:
    """Look once, not at every rerun."""
    mark = (source.mark, choice)
    known: dict[Any, Look] = st.session_state.setdefault("data.upload.looks", {})
    if mark not in known:
        known.clear()
        with st.spinner(_("Reading…")):
            known[mark] = look_at(source.path, choice)
    return known[mark]


def look_at(path: Path, choice: Choice) -> Look:
    """The first rows, and all of them where that is quick. Raises DataError when nothing can be read."""
    sample = tuple(islice(scan(path, choice.options), SAMPLE_ROWS))
    values = [row.value for row in sample if not row.problem]
    if not values:
        problem = sample[0].problem if sample else "it is empty"
        raise DataError(f"{path.name} holds no row that can be read: {problem}", "Choose another file, or mend it.")
    names = dict.fromkeys(str(name) for value in values if isinstance(value, dict) for name in value)
    columns = Columns.parse(choice.columns) if choice.columns else None
    whole = None
    if datasets.imports_at_once(path):
        whole = import_rows(path, choice.layout or None, columns, choice.options)
    return Look(recognise(values), tuple(names), sample, whole)


def _how_to_read(look: Look) -> Choice | None:
    """The layout: recognised, named, or a question and an answer picked from the columns; None until they are."""
    by_hand = [BY_HAND] if look.columns else []
    unknown = look.guess.name is None and bool(by_hand)
    layout = st.selectbox(
        _("Layout"), ["", *by_hand, *ALL_FORMATS], index=int(unknown), key=f"data.upload.layout.{unknown}",
        format_func=_layout_word, help=_("Names in small letters are XTuner's dataset formats."),
    )  # fmt: skip
    if layout != BY_HAND:
        return Choice(layout)
    guess = guess_columns(look.columns)
    names = list(look.columns)
    if st.session_state.get("data.upload.columns") != names:  # another table: what was chosen before means nothing
        for role in ("question", "answer"):
            st.session_state.pop(f"data.upload.{role}", None)
        st.session_state["data.upload.columns"] = names
    left, middle, right = st.columns(3)
    question = left.selectbox(
        _("Question"), names, index=names.index(guess.question) if guess else None, key="data.upload.question",
        placeholder="–",
    )  # fmt: skip
    answer = middle.selectbox(
        _("Answer"), names, index=names.index(guess.answer) if guess else None, key="data.upload.answer",
        placeholder="–",
    )  # fmt: skip
    system = right.selectbox(_("System"), ["", *names], key="data.upload.system", format_func=lambda n: n or "–")
    if question is None or answer is None:
        return None
    return Choice(columns=Columns(question, answer, system).to_text())


def _layout_word(name: str) -> str:
    if name == BY_HAND:
        return _("pick the columns")
    return _(LAYOUT_WORDS.get(name, name)) if name else _("recognise it")


def _take_in(project: Project, source: Source, look: Look, choice: Choice) -> None:
    name = st.text_input(
        _("Name of the dataset"), datasets.dataset_name(Path(source.name)), key=f"data.upload.name.{source.name}"
    )
    good, bad = (len(look.whole.conversations), len(look.whole.problems)) if look.whole else (0, 0)
    keep_good = False
    if (bad and good) or look.whole is None:
        keep_good = st.checkbox(_("Leave out the rows that cannot be used"), key="data.upload.keep")
    _warn_of_replacing(project, name)
    label = ngettext("Import {number} row", "Import {number} rows", good).format(number=good)
    blocked = look.whole is not None and (not good or bool(bad and not keep_good))
    if st.button(
        label if look.whole else _("Import"), type="primary", icon=":material/download_done:", disabled=blocked,
        key="data.upload.go",
    ):  # fmt: skip
        with guarded():
            _import(project, source, name.strip(), choice, keep_good, at_once=look.whole is not None)


def _warn_of_replacing(project: Project, name: str) -> None:
    if name in {dataset.name for dataset in datasets.listed(project)}:
        st.warning(_("This replaces the dataset {name}.").format(name=plain(name)))


def _import(project: Project, source: Source, name: str, choice: Choice, keep_good: bool, at_once: bool) -> None:
    if at_once:
        dataset = datasets.import_file(
            project, source.path, name, choice.layout or None, keep_good, choice.columns, choice.options
        )
        _say_imported(dataset.name, dataset.num_rows)
    else:  # the job needs a file that outlives this session
        path = keep_source(project.folder, source.path) if source.upload else source.path
        job = datasets.start_import(
            project, path, name, choice.layout or None, keep_good, choice.columns, choice.options
        )
        state.keep("data.upload.job", job.id)
    st.rerun()


def _hub_form(project: Project) -> None:
    """A dataset of a hub: its library fetches it in a job."""
    with st.form("data.upload.hub", border=False):
        left, right = st.columns([2, 3])
        hub = left.selectbox(_("Hub"), list(HUB_WORDS), format_func=lambda each: HUB_WORDS[each], key="data.upload.hub")
        dataset_id = right.text_input(_("Dataset"), placeholder="owner/name", key="data.upload.id").strip()
        left, middle, right = st.columns(3)
        split = left.text_input(_("Split"), "train", key="data.upload.split")
        subset = middle.text_input(_("Subset"), key="data.upload.subset", help=_("Empty for the one there is."))
        layout = right.selectbox(
            _("Layout"), ["", *ALL_FORMATS], format_func=_layout_word, key="data.upload.hub.layout"
        )
        name = st.text_input(_("Name of the dataset"), key="data.upload.hub.name", placeholder=_("that of the hub"))
        keep_good = st.checkbox(_("Leave out the rows that cannot be used"), key="data.upload.hub.keep")
        pressed = st.form_submit_button(_("Fetch and import"), type="primary", icon=":material/cloud_download:")
    if not pressed:
        return
    if not dataset_id:
        raise DataError("The dataset's id is missing.", "It looks like owner/name.")
    source = f"{hub}:{dataset_id}"
    job = datasets.start_import(
        project, source, name.strip(), layout or None, keep_good, split=split.strip() or "train", subset=subset.strip()
    )
    state.keep("data.upload.job", job.id)
    st.rerun()


def _under_way(project: Project) -> None:
    """The import that runs, and what became of the last one started here."""
    mine = state.kept("data.upload.job")
    job = newest_job(project.folder, "import")
    if job is None or not (job.live or job.id == mine):
        return
    if not job.live and job.state == "finished":
        state.forget("data.upload.job")
        _say_imported(job.result["dataset"], job.result["num_rows"], job.result.get("num_left_out", 0))
        return
    job_panel(project.folder, jobs.get(project.folder, job.id), "data.upload")


def _say_imported(name: str, num_rows: int, num_left_out: int = 0) -> None:
    words = ngettext("Dataset {name}: {number} row imported.", "Dataset {name}: {number} rows imported.", num_rows)
    if num_left_out:
        words += " " + ngettext("{left} row left out.", "{left} rows left out.", num_left_out)
    state.flash(words.format(name=plain(name), number=num_rows, left=num_left_out))
    state.keep("data.dataset", name)


def _findings(look: Look, choice: Choice) -> None:
    name = _layout_word(look.guess.name) if look.guess.name else _("not recognised")
    sure = f" · {_('{share:.0%} sure').format(share=look.guess.confidence)}" if look.guess.name else ""
    st.markdown(f"**{_('Layout')}: {plain(name)}**{sure} · {plain(told(look.guess.reason))}")
    if look.whole is None:
        st.markdown(_("The first rows of a large source. All of them are read when it is imported."))
        good, bad = _sampled(look.sample, choice)
    else:
        good, bad = look.whole.conversations, [(one.row, one.message) for one in look.whole.problems]
        words = ngettext("{good} row can be used, {bad} cannot.", "{good} rows can be used, {bad} cannot.", len(good))
        st.markdown(words.format(good=len(good), bad=len(bad)))
    if len(bad) > 1 and not good and len({problem for _row, problem in bad}) == 1:
        words = _("All {number} rows looked at: {problem}")
        st.warning(words.format(number=len(bad), problem=plain(told(bad[0][1]))), icon=":material/warning:")
    elif bad:
        st.dataframe(
            [{"row": row, "problem": told(problem)} for row, problem in bad[:SHOWN_PROBLEMS]],
            hide_index=True, height="content" if len(bad) < 8 else 260,
            column_config={
                "row": st.column_config.NumberColumn(_("Row"), width="small"),
                "problem": st.column_config.TextColumn(_("What is wrong"), width="large"),
            },
        )  # fmt: skip
    if good:
        st.dataframe(
            [preview_row(conversation) for conversation in good[:SHOWN_ROWS]],
            hide_index=True, height="content", column_config=preview_columns(),
        )  # fmt: skip


def _sampled(sample: Sequence[RawRow], choice: Choice) -> tuple[list[Conversation], list[tuple[int, str]]]:
    """What the rows of the sample become."""
    columns = Columns.parse(choice.columns) if choice.columns else None
    good: list[Conversation] = []
    bad: list[tuple[int, str]] = []
    for row in sample:
        try:
            if row.problem:
                raise DataError(row.problem)
            good.append(to_conversation(row.value, choice.layout or None, row.number, columns))
        except DataError as error:
            bad.append((row.number, error.message))
    return good, bad
