"""A chat with tools on the Compare page: one model, its calls of tools as steps that fold, and its answer."""

from collections.abc import Generator
from dataclasses import replace

import streamlit as st

from studio import chat_client, runs
from studio.agent.session import Session
from studio.agent.steps import Limits, Step
from studio.agent.tools import SEARCH_KEY, search_is_on
from studio.chat_client import Connection, Line, Sampling
from studio.projects import Project
from studio.ui import state
from studio.ui.agent_turn import AgentTurn
from studio.ui.dialogs import redraw_page
from studio.ui.i18n import _
from studio.ui.model_server import servers
from studio.ui.told import told
from studio.ui.widgets import plain

LOOK_SECONDS = 0.5
SAMPLING = Sampling(max_tokens=256)


def agent_view(project: Project) -> None:
    """Choose a model of the running server, and talk to it."""
    connection = _connection(project)
    if connection is None:
        st.info(_("No model is loaded yet. Load one under “Side by side”; it can be asked here then."))
        return
    session, line = _session(connection)
    turns: list[AgentTurn] = state.kept("agent.turns") or []
    for turn in turns[:-1]:
        _turn(turn)
    if turns:
        st.fragment(_last_turn, run_every=LOOK_SECONDS if turns[-1].busy else None)(turns[-1], turns[-1].busy)
    question = st.chat_input(_("Ask with tools"), key="agent.question", disabled=bool(turns) and turns[-1].busy)
    if question and question.strip():
        state.keep("agent.turns", [*turns, AgentTurn(session, question.strip(), line).start()])
        st.rerun()


def _connection(project: Project) -> Connection | None:
    live = (job for job in servers(project) if job.live)
    return next((found for job in live if (found := runs.server_connection(project, job))), None)


def _session(connection: Connection) -> tuple[Session, Line]:
    """The session of these settings and its line to the model; other settings begin another conversation."""
    left, middle, right = st.columns([3, 2, 3], vertical_alignment="bottom")
    models = chat_client.list_models(connection)
    model = left.selectbox(_("Model"), models, index=len(models) - 1, key="agent.model")
    names = {"react": _("ReAct (MSAgent)"), "moss": _("MOSS plugins")}
    protocol = middle.selectbox(
        _("Protocol"), list(names), format_func=lambda name: names[name], key="agent.protocol",
        help=_("How tools are called. Take the one that the weights were trained with."),
    )  # fmt: skip
    tools = right.pills(_("Tools"), _tool_labels(), selection_mode="multi", default=["calculate", "solve"],
                        format_func=lambda name: _tool_labels()[name], key="agent.tools")  # fmt: skip
    if not search_is_on():
        st.caption(_("Web search is off: it needs a key in the environment variable {name}.").format(name=SEARCH_KEY))
    settings = (connection.url, model, protocol, tuple(tools))
    if state.kept("agent.settings") != settings:
        _begin(connection, model, protocol, tuple(tools))
        state.keep("agent.settings", settings)
    return state.kept("agent.session"), state.kept("agent.line")


def _tool_labels() -> dict[str, str]:
    labels = {"calculate": _("Calculator"), "solve": _("Equation solver"), "search": _("Web search")}
    return labels if search_is_on() else {name: label for name, label in labels.items() if name != "search"}


def _begin(connection: Connection, model: str, protocol: str, tools: tuple[str, ...]) -> None:
    line = Line()

    def ask(messages: list[dict[str, str]], stops: list[str]) -> Generator[str, None, None]:
        return chat_client.stream_chat(connection, model, messages, replace(SAMPLING, stop=tuple(stops)), line)

    for turn in state.kept("agent.turns") or []:
        turn.stop()
    state.keep("agent.session", Session(ask, tools, protocol))
    state.keep("agent.line", line)
    state.keep("agent.turns", [])


def _turn(turn: AgentTurn) -> None:
    with st.container(border=True, gap="xsmall"):
        st.markdown(f":material/person: **{plain(turn.question)}**")
        for step in list(turn.steps):
            _step(step)
        if turn.error:
            st.error(plain(told(turn.error)), icon=":material/error:")
        if turn.busy:
            st.caption(_("thinking…"))


def _step(step: Step) -> None:
    """Whatever a model or a tool said is shown as text."""
    if step.tool:
        icon = ":material/error:" if step.failed else ":material/build:"
        with st.expander(f"{icon} {plain(step.tool)}: {plain(step.tool_input[:80])}"):
            if step.thought:
                st.caption(f"{_('Thought')}: {plain(step.thought)}")
            st.caption(_("Input of the tool"))
            st.code(step.tool_input or " ", language=None, wrap_lines=True)
            st.caption(_("What came back"))
            st.text(step.result)
        return
    if step.thought:
        st.caption(plain(step.thought))
    if step.answer:
        st.text(step.answer)
    if said := _ending(step):
        st.caption(said)


def _ending(step: Step) -> str:
    if step.ended_by == "answer":
        return "" if step.answer else _("It said nothing.")
    ends = {
        "steps": _("It ended without an answer: {number} calls of tools are allowed for a question.").format(
            number=Limits.max_steps
        ),
        "time": _("It ended without an answer: the time was over."),
        "stopped": _("stopped"),
    }
    return ends.get(step.ended_by, "")


def _last_turn(turn: AgentTurn, drawn_busy: bool) -> None:
    _turn(turn)
    if turn.busy:
        st.button(_("Stop"), icon=":material/stop:", key="agent.stop", on_click=turn.stop)
    elif drawn_busy:
        redraw_page()
    elif st.button(_("Clear"), icon=":material/delete_sweep:", key="agent.clear", on_click=_clear):
        st.rerun()


def _clear() -> None:
    state.keep("agent.turns", [])
    state.kept("agent.session").reset()
