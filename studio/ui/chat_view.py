"""A conversation as columns: its turns, the answers as they come, and what to ask next."""

from collections.abc import Mapping, Sequence

import streamlit as st

from studio import chats
from studio.chat_client import Connection
from studio.chats import Told
from studio.projects import Project
from studio.ui import chat_state, state
from studio.ui.chat_answer import answer_tools
from studio.ui.chat_keep import added_note
from studio.ui.chat_settings import settings_bar
from studio.ui.chat_turn import cells, question_line
from studio.ui.chat_votes import vote_row
from studio.ui.demo import demo_bar
from studio.ui.dialogs import redraw_page
from studio.ui.exchange import Exchange
from studio.ui.i18n import _
from studio.ui.prompts import prompt_buttons
from studio.ui.widgets import guarded

STREAM_SECONDS = 0.3
ASKED = "compare.asked"


def read_view(project: Project) -> bool:
    """The open conversation, to read; False when none is open."""
    chat = chat_state.open_chat(project)
    if chat is None:
        return False
    for told in chats.read(project, chat.id):
        _turn(project, told, chat.labels, None, 0)
    return True


def chat_view(project: Project, base: str, labels: Mapping[str, str], connection: Connection) -> None:
    """Read on and ask: `labels` are the columns that are loaded, by their names on the server."""
    chat = chat_state.open_chat(project)
    told = chats.read(project, chat.id) if chat else []
    exchange = chat_state.exchange_now()
    live = exchange if exchange and exchange.busy and told and told[-1].turn.id == exchange.turn_id else None
    if chat_state.demo_is_on():
        demo_bar()
    else:
        settings_bar(labels, connection, started=bool(told))
    heads = {**chat.labels, **labels} if chat else labels
    _turns(project, told, heads, connection, live)
    if live:
        question_line(told[-1])
        st.fragment(_live_turn, run_every=STREAM_SECONDS)(told[-1], heads, live)
    elif told and not chat_state.demo_is_on():
        _last_tools(told)
        added_note(project)
    _next_question(project, base, labels, connection, told, busy=live is not None)


def _turns(
    project: Project,
    told: Sequence[Told],
    labels: Mapping[str, str],
    connection: Connection,
    live: Exchange | None,
) -> None:
    """All that was said; on a projector the newest alone, so nothing where that is still being answered."""
    answered = len(told) - (live is not None)
    newest_alone = chat_state.demo_is_on()
    for number, each in enumerate(told[:answered]):
        if not newest_alone or number == len(told) - 1:
            _turn(project, each, labels, None if live else connection, number)


def _next_question(
    project: Project,
    base: str,
    labels: Mapping[str, str],
    connection: Connection,
    told: Sequence[Told],
    busy: bool,
) -> None:
    """Ask what was typed, picked, edited or is to be asked again."""
    if not busy:
        prompt_buttons(ASKED, first=not told)
    typed = st.chat_input(_("Ask all of them"), key="compare.question", disabled=busy)
    before, question, more_seed = len(told), (typed or "").strip(), 0
    if asked := state.kept(ASKED):
        state.forget(ASKED)
        before, question, more_seed = asked.get("before", len(told)), asked["question"], asked.get("more_seed", 0)
    if question and not busy:
        chat_state.ask(project, base, labels, connection, told[:before], question, more_seed)
        st.rerun()


def _last_tools(told: Sequence[Told]) -> None:
    last = told[-1].turn
    again = {"before": len(told) - 1, "question": last.question, "more_seed": len(told[-1].branches)}
    st.button(
        _("Answer again"), icon=":material/refresh:", key="compare.again", type="tertiary",
        on_click=state.keep, args=(ASKED, again),
        help=_("As a branch, with the next seed; the answers before stay. At temperature 0 they come out the same."),
    )  # fmt: skip


def _live_turn(told: Told, labels: Mapping[str, str], exchange: Exchange) -> None:
    """Redraws itself while answers come, then the page."""
    cells(told, labels, exchange.replies)
    st.button(_("Stop"), icon=":material/stop:", key="compare.stop", on_click=exchange.stop)
    if not exchange.busy:
        redraw_page()


def _turn(project: Project, told: Told, labels: Mapping[str, str], connection: Connection | None, number: int) -> None:
    with st.container(gap="xsmall"):
        with question_line(told), st.container(horizontal=True, gap="xsmall", width="content"):
            _branches(project, told)
            if connection and not chat_state.demo_is_on():
                _edit(told, number)
        cells(
            told,
            labels,
            told.replies,
            lambda reply: answer_tools(project, told, reply, labels.get(reply.model, reply.model), connection),
        )
        vote_row(project, told, labels)


def _branches(project: Project, told: Told) -> None:
    """To the turns that were asked at the same place."""
    if len(told.branches) < 2:
        return
    for step, icon in ((-1, ":material/chevron_left:"), (1, ":material/chevron_right:")):
        if step == 1:
            st.caption(f"{told.place} / {len(told.branches)}", width="content")
        there = 0 < told.place + step <= len(told.branches)
        other = told.branches[(told.place - 1 + step) % len(told.branches)]
        st.button(
            "", icon=icon, key=f"compare.branch.{told.turn.id}.{step}", type="tertiary", disabled=not there,
            help=_("Another branch"), on_click=guarded()(chats.open_branch), args=(project, told.turn.chat_id, other),
        )  # fmt: skip


def _edit(told: Told, number: int) -> None:
    """Ask another question in this place."""
    with st.popover("", icon=":material/edit:", type="tertiary", help=_("Edit the question")):
        key = f"compare.edit.{told.turn.id}"
        text = st.text_area(_("Question"), told.turn.question, key=key, width=420)
        st.caption(_("It is asked as a branch; what was said before stays."))
        st.button(
            _("Ask this"), type="primary", key=f"{key}.ask", disabled=not text.strip(),
            on_click=state.keep, args=(ASKED, {"before": number, "question": text.strip()}),
        )  # fmt: skip
