"""Data page, tab Browse: a dataset's rows to read and edit, what is wrong with them, what is in them, its versions."""

import streamlit as st

from studio import datasets
from studio.datasets import Dataset
from studio.projects import Project
from studio.store.datasets import Version
from studio.ui import state
from studio.ui.data_build import dataset_line
from studio.ui.data_check import check_view
from studio.ui.data_report import report_view
from studio.ui.data_row import row_view
from studio.ui.data_table import choose_rows, open_rows, table
from studio.ui.i18n import N_, _, ngettext
from studio.ui.told import told
from studio.ui.widgets import ago, guarded, plain

KIND_WORDS = {
    "identity": N_("identity"),
    "general": N_("general"),
    "tutorial": N_("tutorial"),
    "import": N_("imported"),
}
SHOWN_VERSIONS = 20


def browse_tab(project: Project) -> None:
    """Every change is a new version; the uploaded source file is never touched."""
    there = datasets.listed(project)
    if not there:
        st.info(_("No dataset yet. Build one in the first tab, or upload a file."), icon=":material/inbox:")
        return
    dataset = _pick(there)
    _headline(project, dataset)  # first: a dataset that cannot be read can be deleted
    views = {"rows": _("Read and edit"), "check": _("Check"), "report": _("Report")}
    view = st.segmented_control(
        _("View"), list(views), format_func=lambda name: views[name], default="rows", required=True,
        key="data.browse.view", label_visibility="collapsed",
    )  # fmt: skip
    with guarded():
        if view == "check":
            check_view(project, dataset)
        elif view == "report":
            report_view(project, dataset)
        else:
            _rows_and_life(project, dataset)


def _rows_and_life(project: Project, dataset: Dataset) -> None:
    rows = open_rows(project, dataset)
    left, right = st.columns([3, 2], gap="large")
    with left:
        numbers = choose_rows(rows, dataset)
        with guarded():
            table(project, dataset, rows, numbers)
    with right, guarded():
        row_view(project, dataset, rows, numbers)


def _pick(there: list[Dataset]) -> Dataset:
    names = [dataset.name for dataset in there]
    chosen = state.kept("data.dataset")
    name = st.segmented_control(
        _("Dataset"), names, default=chosen if chosen in names else names[0], required=True,
        key=f"data.browse.pick.{'.'.join(names)}.{chosen}", label_visibility="collapsed",
    )  # fmt: skip
    return next(dataset for dataset in there if dataset.name == name)


def _headline(project: Project, dataset: Dataset) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        kind = _(KIND_WORDS.get(dataset.kind, dataset.kind))
        version = _("version {number}").format(number=dataset.version)
        st.markdown(
            f"{dataset_line(dataset)} · {kind} · {version} · {ago(dataset.created_at)} · "
            f":gray[{_('fingerprint')} {dataset.fingerprint[:12]}]"
        )
        with st.popover(_("Versions"), icon=":material/history:", key="data.browse.versions"), guarded():
            _versions(project, dataset)
        with st.popover(_("Delete"), icon=":material/delete:", key="data.browse.delete"):
            st.markdown(_("Delete this dataset and its held-out questions? The uploaded source file stays."))
            st.button(
                _("Delete for good"), key="data.browse.delete.sure", on_click=_delete, args=(project, dataset.name)
            )


def _versions(project: Project, dataset: Dataset) -> None:
    """What the dataset was, newest first; any of it can be brought back."""
    known = datasets.versions(project, dataset.name)
    if len(known) > 1 and known[0].parent:
        st.button(
            _("Undo the last change"), icon=":material/undo:", key="data.browse.undo", width="stretch",
            on_click=_undo, args=(project, dataset),
        )  # fmt: skip
    for version in known[:SHOWN_VERSIONS]:
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.markdown(f"**{version.number}** · {plain(told(version.made_by))}  \n:small[:gray[{_line(version)}]]")
            if version.number == dataset.version:
                st.badge(_("now"))
            else:
                st.button(
                    _("Bring back"), key=f"data.browse.restore.{version.number}", on_click=_restore,
                    args=(project, dataset, version.number),
                )  # fmt: skip
    if len(known) > SHOWN_VERSIONS:
        st.caption(_("Older ones: `retune data versions`."))


def _line(version: Version) -> str:
    rows = ngettext("{number} row", "{number} rows", version.num_rows).format(number=version.num_rows)
    return f"{rows} · {ago(version.created_at)} · {version.fingerprint[:12]}"


def _undo(project: Project, dataset: Dataset) -> None:
    with guarded():
        datasets.undo(project, dataset.name, dataset.version)
        state.flash(_("The last change is taken back."))


def _restore(project: Project, dataset: Dataset, number: int) -> None:
    with guarded():
        datasets.restore(project, dataset.name, number, dataset.version)
        state.flash(_("Version {number} is back.").format(number=number))


def _delete(project: Project, name: str) -> None:
    with guarded():
        datasets.delete(project, name)
        state.forget("data.dataset")
        state.flash(_("Dataset {name} is deleted.").format(name=plain(name)))
