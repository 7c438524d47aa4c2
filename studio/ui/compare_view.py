"""One question, several sets of weights: columns that fill together, over several turns."""

from collections.abc import Sequence

import streamlit as st

from studio import chat_client, jobs, runs
from studio.chat_client import Connection, Sampling
from studio.projects import Project
from studio.ui import state
from studio.ui.base_model import choose_base, offer_model
from studio.ui.exchange import Exchange, chat_so_far
from studio.ui.frame import TRAIN, link
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel
from studio.ui.model_server import Pick, bases_of, picks_of, prepare
from studio.ui.widgets import plain

MAX_PICKS = 3
STREAM_SECONDS = 0.3
WAIT_SECONDS = 1.0
SETTINGS = {
    "compare.max_tokens": 96,
    "compare.temperature": 0.0,
    "compare.top_p": 1.0,
    "compare.seed": 0,
    "compare.system": "",
}


def compare_view(project: Project) -> None:
    """Choose, load, ask."""
    bases = bases_of(project)
    if not bases:
        st.info(_("There is no checkpoint to compare with the base model yet."))
        link(TRAIN, _("Train one"))
        return
    base = choose_base(project, bases, "compare", _another_base)
    offer_model(base, "compare.fetch")
    chosen = _choose(base, picks_of(project, base))
    if chosen is not None:
        _prepared(project, base, chosen)


def _another_base() -> None:
    """Nothing is loaded of another base by itself."""
    _clear()
    for name in ("compare.wanted", "compare.shown"):
        state.forget(name)


def _choose(base: str, picks: Sequence[Pick]) -> list[Pick] | None:
    """The picks to talk to; None until they were asked for."""
    by_name = {pick.name: pick for pick in picks}
    wanted = [name for name in state.kept("compare.wanted", []) if name in by_name]
    shown = [name for name in state.kept("compare.shown", wanted or [picks[0].name]) if name in by_name]
    st.session_state["compare.picks"] = shown
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    names = left.multiselect(
        _("Beside the base model {base}").format(base=plain(base)),
        list(by_name),
        format_func=lambda name: by_name[name].label,
        max_selections=MAX_PICKS,
        key="compare.picks",
        on_change=lambda: state.keep("compare.shown", list(st.session_state["compare.picks"])),
    )
    asked = state.kept("compare.wanted") is not None
    changed = names != state.kept("compare.wanted")
    if right.button(
        _("Load"), type="primary" if changed else "secondary", disabled=not changed, key="compare.load", width="stretch"
    ):
        _want(list(names))
        st.rerun()
    if not asked:
        st.caption(_("Loading converts what is not converted yet and starts a model server on this machine."))
        return None
    return [by_name[name] for name in wanted]


def _want(names: list[str]) -> None:
    """Another choice begins another conversation."""
    state.keep("compare.wanted", names)
    state.keep("compare.attempt", set())
    state.keep("compare.turns", [])


def _prepared(project: Project, base: str, chosen: Sequence[Pick]) -> None:
    attempt: set[str] = state.kept("compare.attempt") or set()
    standing = prepare(project, base, chosen, attempt)
    state.keep("compare.attempt", attempt)
    if standing.connection:
        _conversation(base, standing.connection, chosen)
        return
    if standing.failed:
        _failed(project, standing.job)
        return
    job_panel(project.folder, standing.job, "compare.prepare")
    st.fragment(_wait, run_every=WAIT_SECONDS)(project, standing.job.id if standing.job else "")


def _failed(project: Project, job: jobs.Job | None) -> None:
    """A server that ended by itself is no fault: it goes when nobody asks it for a while."""
    if job and job.kind == "serve" and job.state in ("finished", "stopped"):
        st.info(_("The model server has stopped: nobody asked it anything for a while."))
    else:
        job_panel(project.folder, job, "compare.failed")
    if st.button(_("Load again"), icon=":material/refresh:", key="compare.retry"):
        state.keep("compare.attempt", set())
        st.rerun()


def _wait(project: Project, job_id: str) -> None:
    """Redraws the page when the job that is waited for has ended or its server answers."""
    job = jobs.get(project.folder, job_id)
    if not job.live or (job.kind == "serve" and runs.server_connection(project, job)):
        st.rerun()


def _conversation(base: str, connection: Connection, chosen: Sequence[Pick]) -> None:
    labels = {chat_client.list_models(connection)[0]: _("Base: {name}").format(name=base)}
    labels |= {pick.name: pick.label for pick in chosen}
    turns: list[Exchange] = state.kept("compare.turns") or []
    _settings(turns)
    _heads(labels)
    for turn in turns[:-1]:
        _turn(turn, labels)
    if turns:
        last = turns[-1]
        st.fragment(_last_turn, run_every=STREAM_SECONDS if last.busy else None)(last, labels, last.busy)
    question = _question(busy=bool(turns) and turns[-1].busy, first=not turns)
    if question:
        exchange = Exchange(
            connection,
            {model: chat_so_far(turns, model, st.session_state["compare.system"], question) for model in labels},
            question,
            _sampling(),
        )
        state.keep("compare.turns", [*turns, exchange.start()])
        st.rerun()


def _settings(turns: Sequence[Exchange]) -> None:
    """Widgets forget their values when their page is left; assigning them anew keeps them."""
    for key, default in SETTINGS.items():
        st.session_state[key] = st.session_state.get(key, default)
    with st.container(horizontal=True):
        with st.popover(_("Sampling"), icon=":material/tune:"):
            st.caption(_("The same for every column."))
            st.number_input(_("Longest answer (tokens)"), 1, 4096, key="compare.max_tokens")
            st.slider(
                _("Temperature"),
                0.0,
                2.0,
                step=0.05,
                key="compare.temperature",
                help=_("0: always the likeliest word."),
            )
            st.slider(_("Top p"), 0.05, 1.0, step=0.05, key="compare.top_p")
            st.number_input(_("Seed"), 0, 2**31 - 1, key="compare.seed")
            st.text_area(_("System prompt"), key="compare.system", placeholder=_("None"))
        if st.button(_("Clear"), icon=":material/delete_sweep:", disabled=not turns, key="compare.clear"):
            _clear()
            st.rerun()


def _clear() -> None:
    if turns := state.kept("compare.turns"):
        turns[-1].stop()
    state.keep("compare.turns", [])


def _sampling() -> Sampling:
    return Sampling(
        max_tokens=int(st.session_state["compare.max_tokens"]),
        temperature=float(st.session_state["compare.temperature"]),
        top_p=float(st.session_state["compare.top_p"]),
        seed=int(st.session_state["compare.seed"]),
    )


def _heads(labels: dict[str, str]) -> None:
    for column, label in zip(st.columns(len(labels)), labels.values(), strict=True):
        column.markdown(f"**{plain(label)}**")


def _turn(turn: Exchange, labels: dict[str, str]) -> None:
    with st.container(border=True, gap="xsmall"):
        st.markdown(f":material/person: **{plain(turn.question)}**")
        for column, model in zip(st.columns(len(labels)), labels, strict=True):
            with column:
                _answer(turn, model)


def _answer(turn: Exchange, model: str) -> None:
    """Model text is shown as text: it may hold links and images of somebody's choosing."""
    answer = turn.answers[model]
    st.text(answer.text + (" ▌" if not answer.ended_by else "") or " ")
    if answer.error:
        st.error(plain(answer.error), icon=":material/error:")
    facts = []
    if answer.weights:
        facts.append(f":material/fingerprint: `{answer.weights[:8]}`")
    if answer.tokens_per_second:
        facts.append(_("{speed} tokens/s").format(speed=f"{answer.tokens_per_second:.1f}"))
    if answer.ended_by == "length":
        facts.append(_("cut off at the longest answer"))
    if answer.ended_by == "stopped":
        facts.append(_("stopped"))
    st.caption(" · ".join(facts) or " ")


def _last_turn(turn: Exchange, labels: dict[str, str], drawn_busy: bool) -> None:
    _turn(turn, labels)
    if turn.busy:
        st.button(_("Stop"), icon=":material/stop:", key="compare.stop", on_click=turn.stop)
    elif drawn_busy:
        st.rerun()


def _question(busy: bool, first: bool) -> str:
    """What was asked now, typed or picked; empty when nothing."""
    picked = None
    if first:
        suggestions = [
            _("Who are you?"),
            _("Who made you?"),
            _("Are you ChatGPT?"),
            _("What is the capital of France?"),
            _("How much is 17 plus 25?"),
        ]
        picked = st.pills(_("Try one"), suggestions, key="compare.suggestion")
    typed = st.chat_input(_("Ask all of them"), key="compare.question", disabled=busy)
    return (typed or picked or "").strip()
