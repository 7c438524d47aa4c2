"""One turn of a conversation: the question, and the answer of each column with what is known of it."""

from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from studio.chats import Reply, Told
from studio.ui import told as words
from studio.ui.i18n import _
from studio.ui.widgets import plain

MOST_IN_A_ROW, IN_A_ROW = 4, 3  # columns; more than four are shown in rows of three
ICONS = {"off": ":material/deployed_code:", "on": ":material/layers:", "full model": ":material/merge:"}


def question_line(told: Told) -> Any:
    """The question, as a container to which its tools may be added."""
    line = st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute")
    line.markdown(f":material/person: **{plain(told.turn.question)}**", width="stretch")
    if told.turn.system:
        st.caption(f":material/settings: {plain(told.turn.system)}")
    return line


def cells(
    told: Told,
    labels: Mapping[str, str],
    replies: Mapping[str, Reply],
    tools: Callable[[Reply], None] | None = None,
) -> None:
    """The answers side by side, in rows; without their names while nobody may know which is which."""
    shown = [model for model in told.turn.models if model in replies]
    if not shown:
        st.caption(_("No answer is kept yet: another window may still wait for them. Answer again if none comes."))
    width = len(shown) if len(shown) <= MOST_IN_A_ROW else IN_A_ROW
    for first in range(0, len(shown), width or 1):
        for place, column in enumerate(st.columns(width), start=first):
            if place < len(shown):
                model = shown[place]
                with column.container(border=True, height="stretch", gap="xsmall"):
                    _cell(told, replies[model], told.head(model, labels), tools)


def _cell(told: Told, reply: Reply, head: str, tools: Callable[[Reply], None] | None) -> None:
    """Model text is shown as text: it may hold links and images of somebody's choosing."""
    icon = "" if told.hidden else ICONS.get(reply.proof.get("adapter", ""), "")
    won = told.vote and told.vote.model == reply.model
    st.markdown(f"{icon} **{plain(head)}**" + (" :material/trophy:" if won else ""))
    st.text(reply.text + ("" if reply.ended_by else " ▌") or " ")
    if reply.error:
        st.error(plain(words.told(reply.error)), icon=":material/error:")
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.caption(" · ".join(facts(reply, told.hidden)) or " ", width="stretch")
        if tools and reply.ended_by:
            tools(reply)


def facts(reply: Reply, hidden: bool = False) -> list[str]:
    """Under an answer: which weights, how fast, how it ended. Hash and speed would give a hidden column away."""
    said = []
    if reply.proof.get("weights") and not hidden:
        said.append(f":material/fingerprint: `{str(reply.proof['weights'])[:8]}`")
    if reply.seconds and not hidden:
        said.append(_("{speed} tokens/s").format(speed=f"{reply.num_tokens / reply.seconds:.1f}"))
        said.append(_("first after {seconds} s").format(seconds=f"{reply.first_token_seconds:.2f}"))
    if reply.ended_by == "length":
        said.append(_("cut off at the longest answer"))
    if reply.ended_by == "stopped":
        said.append(_("stopped"))
    return said
