"""Keeping an answer: as a row of a dataset, as it was given or repaired, in one press or after a look."""

import streamlit as st

from studio import chats, datasets, kept_answers
from studio.chats import Reply, Told
from studio.kept_answers import KeptRow
from studio.probes import library
from studio.projects import Project
from studio.ui import state
from studio.ui.i18n import _, ngettext
from studio.ui.told import told as translated
from studio.ui.widgets import guarded, plain

DEFAULT_DATASET = "chosen"
DEFAULT_SUITE = "from_chats"
DATASET = "compare.dataset"
ADDED = "compare.added"


def dataset_name() -> str:
    """Where answers go: the dataset that was used last."""
    return str(state.kept(DATASET, DEFAULT_DATASET))


def keep_better(project: Project, told: Told) -> None:
    """One press makes the answer that won a row."""
    if told.vote is None or told.vote.choice != "better" or told.vote.model not in told.replies:
        return
    st.button(
        _("Add it to {dataset}").format(dataset=plain(dataset_name())),
        icon=":material/playlist_add:", key=f"compare.keep.{told.turn.id}", type="tertiary",
        on_click=_keep_better, args=(project, told, told.vote.model),
    )  # fmt: skip


def _keep_better(project: Project, told: Told, model: str) -> None:
    with guarded():
        _added(_add(project, told, model, told.replies[model].text, dataset_name()))


def keep_dialog(project: Project, told: Told, reply: Reply, label: str) -> None:
    """The answer as a row, to look at and mend before; or its question as a probe."""
    st.caption(plain(label))
    st.markdown(f":material/person: {plain(told.turn.question)}")
    as_row, as_probe = st.tabs([_("As a row of a dataset"), _("As a probe")])
    key = f"compare.keep.{reply.turn_id}.{reply.model}"
    with as_row, guarded():
        row_form(project, told, reply, key)
    with as_probe, guarded():
        probe_form(project, told, reply, key)


def row_form(project: Project, told: Told, reply: Reply, key: str) -> None:
    answer = st.text_area(_("What it should say"), reply.text, key=f"{key}.answer", height=160)
    options = list(dict.fromkeys([dataset_name(), *(dataset.name for dataset in datasets.listed(project))]))
    name = st.selectbox(
        _("Dataset"), options, key=f"{key}.dataset", accept_new_options=True,
        help=_("Choose one, or type a new name. A row is added at its end, as a new version."),
    )  # fmt: skip
    if st.button(_("Add as a row"), type="primary", icon=":material/playlist_add:", key=f"{key}.add"):
        _added(_add(project, told, reply.model, answer, name or ""))
        st.rerun()


def probe_form(project: Project, told: Told, reply: Reply, key: str) -> None:
    st.caption(_("The scorecard asks it of every checkpoint from then on."))
    says = st.text_input(_("The answer must say"), key=f"{key}.says")
    says_not = st.text_input(_("The answer must not say"), key=f"{key}.says_not")
    name = st.selectbox(
        _("Probe suite"), list(dict.fromkeys([DEFAULT_SUITE, *library.own_names(project.folder)])), key=f"{key}.suite",
        accept_new_options=True,
    )  # fmt: skip
    if st.button(_("Add as a probe"), type="primary", icon=":material/quiz:", key=f"{key}.add_probe"):
        before = chats.before(project, told.turn)
        suite = kept_answers.add_probe(project, name or "", before, told, reply.model, says, says_not)
        state.flash(_("A probe was added to {suite}.").format(suite=suite.name or name))
        st.rerun()


def _add(project: Project, told: Told, model: str, answer: str, name: str) -> KeptRow:
    row = kept_answers.conversation_of(chats.before(project, told.turn), told, model, answer)
    state.keep(DATASET, name)
    return kept_answers.add_row(project, name, row, "an answer kept from Compare")


def _added(kept: KeptRow) -> None:
    """What happened is said until the next row is kept, or it is taken back."""
    state.keep(ADDED, kept)


def added_note(project: Project) -> None:
    """The row that was kept last: what the lint says of it, and the way back."""
    kept: KeptRow | None = state.kept(ADDED)
    if kept is None:
        return
    lines = [f"- {plain(translated(finding.message))}" for finding in kept.findings]
    count = ngettext("The check finds {number} thing:", "The check finds {number} things:", len(lines))
    said = _("Row {row} of {dataset} was added.").format(row=kept.row, dataset=plain(kept.dataset))
    with st.container(horizontal=True, vertical_alignment="center"):
        if lines:
            st.warning("\n".join([f"{said} {count.format(number=len(lines))}", "", *lines]))
        else:
            st.success(said + " " + _("The check finds nothing wrong with it."), icon=":material/check_circle:")
        st.button(_("Take it back"), icon=":material/undo:", key="compare.take_back", on_click=_take_back,
                  args=(project, kept))  # fmt: skip
        st.button("", icon=":material/close:", key="compare.added.close", type="tertiary", on_click=state.forget,
                  args=(ADDED,), help=_("Close"))  # fmt: skip


def _take_back(project: Project, kept: KeptRow) -> None:
    with guarded():
        state.forget(ADDED)
        kept_answers.take_back(project, kept)
