"""Compare's chat: which columns, loading them by jobs, then one question to all of them."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import streamlit as st

from studio import chat_client, jobs, runs
from studio.projects import Project
from studio.ui import chat_state, state
from studio.ui.base_model import choose_base, offer_model
from studio.ui.chat_history import history_bar
from studio.ui.chat_view import chat_view, read_view
from studio.ui.dialogs import redraw_page
from studio.ui.frame import TRAIN, link
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel
from studio.ui.model_server import Pick, bases_of, merged_of, picks_of, prepare
from studio.ui.widgets import guarded

MAX_COLUMNS = 6
WAIT_SECONDS = 1.0


def compare_view(project: Project) -> None:
    """Choose, load, ask."""
    demo = chat_state.demo_is_on()
    if not demo:
        history_bar(project)
    bases = bases_of(project)
    if not bases:
        if not read_view(project):
            st.info(_("There is no checkpoint to compare with the base model yet."))
            link(TRAIN, _("Train one"))
        return
    base = choose_base(project, bases, "compare", _another_base)
    offer_model(base, "compare.fetch")
    picks = [*picks_of(project, base), *merged_of(project, base)]
    labels = {base: _("Base: {name}").format(name=base)} | {pick.name: pick.label for pick in picks}
    wanted = _wanted(labels) if demo else _choose(labels, picks)
    if wanted:
        _prepared(project, base, {name: labels[name] for name in wanted}, [p for p in picks if p.name in wanted])
    else:
        chat_state.set_demo(False)  # nothing is loaded that could be shown to a room
        read_view(project)


def _wanted(labels: Mapping[str, str]) -> list[str]:
    """The columns that were asked for, as far as they are still there."""
    return [name for name in state.kept("compare.wanted", []) if name in labels]


def _another_base() -> None:
    """Nothing is loaded of another base by itself."""
    chat_state.leave()
    for name in ("compare.wanted", "compare.shown"):
        state.forget(name)


def _choose(labels: dict[str, str], picks: Sequence[Pick]) -> list[str]:
    """The columns to talk to; none until they were asked for."""
    wanted = _wanted(labels)
    first = [next(iter(labels)), picks[0].name]
    shown = [name for name in state.kept("compare.shown", wanted or first) if name in labels]
    st.session_state["compare.picks"] = shown
    left, middle, right = st.columns([6, 1.4, 1], vertical_alignment="bottom")
    names = left.multiselect(
        _("Columns"),
        list(labels),
        format_func=lambda name: labels[name],
        max_selections=MAX_COLUMNS,
        key="compare.picks",
        on_change=lambda: state.keep("compare.shown", list(st.session_state["compare.picks"])),
        help=_("The base model, adapters on it and merged models, up to six. A merged model takes memory of its own."),
    )
    with middle:
        bits = _bits()
    changed = names != wanted or bits != state.kept("compare.bits", 0)
    if right.button(
        _("Load"),
        type="primary" if changed else "secondary",
        disabled=not names or not changed,
        key="compare.load",
        width="stretch",
    ):
        _want(list(names), bits)
        st.rerun()
    if not wanted:
        st.caption(_("Loading converts what is not converted yet and starts a model server on this machine."))
    return wanted


def _bits() -> int:
    """How many bits the base's weights are loaded in; a choice where the library for it is installed."""
    words = {0: _("as stored"), 8: _("8 bits"), 4: _("4 bits")}
    can = find_spec("bitsandbytes") is not None
    st.session_state["compare.bits"] = st.session_state.get("compare.bits", state.kept("compare.bits", 0))
    return st.selectbox(
        _("Weights"), list(words), format_func=lambda bits: words[bits], key="compare.bits", disabled=not can,
        help=_("Fewer bits take less memory and change the answers a little.") if can
        else _("Needs the package bitsandbytes."),
    )  # fmt: skip


def _want(names: list[str], bits: int) -> None:
    """Another choice begins another conversation; the one before is kept."""
    if names != chat_state.columns_of_chat():
        chat_state.leave()
    state.keep("compare.wanted", names)
    state.keep("compare.bits", bits)
    state.keep("compare.attempt", set())


def _prepared(project: Project, base: str, labels: dict[str, str], chosen: Sequence[Pick]) -> None:
    attempt: set[str] = state.kept("compare.attempt") or set()
    standing = prepare(project, base, chosen, attempt, state.kept("compare.bits", 0))
    state.keep("compare.attempt", attempt)
    if standing.connection:
        known = chat_client.list_models(standing.connection)
        chat_view(project, base, {name: label for name, label in labels.items() if name in known}, standing.connection)
        return
    if standing.failed:
        _failed(project, standing.job)
    else:
        job_panel(project.folder, standing.job, "compare.prepare")
        st.fragment(_wait, run_every=WAIT_SECONDS)(project, standing.job.id if standing.job else "")
    read_view(project)


def _failed(project: Project, job: jobs.Job | None) -> None:
    """A server that ended by itself, as it does when nobody asks it for a while, or that was stopped, is no fault."""
    if job and job.kind == "serve" and job.state == "finished":
        st.info(_("The model server has stopped: nobody asked it anything for a while."))
    elif job and job.kind == "serve" and job.state == "stopped":
        st.info(_("The model server was stopped."))
    else:
        job_panel(project.folder, job, "compare.failed")
    if st.button(_("Load again"), icon=":material/refresh:", key="compare.retry"):
        state.keep("compare.attempt", set())
        st.rerun()


@guarded()
def _wait(project: Project, job_id: str) -> None:
    """Redraws the page when the job that is waited for has ended or its server answers."""
    job = jobs.get(project.folder, job_id)
    if not job.live or (job.kind == "serve" and runs.server_connection(project, job)):
        redraw_page()
