"""Conversations of the project: find one, open it, rename it, delete it, begin anew."""

import streamlit as st

from studio import chat_export, chats
from studio.chats import Chat
from studio.paths import slugify
from studio.projects import Project
from studio.ui import chat_state
from studio.ui.chat_votes import tally_view
from studio.ui.i18n import _, ngettext
from studio.ui.widgets import ago, guarded, plain

MOST_SHOWN = 30


def history_bar(project: Project) -> None:
    """The open conversation's title and what can be done with it; a list of the others behind a button."""
    chat = chat_state.open_chat(project)
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover(_("Conversations"), icon=":material/forum:"), st.container(gap="xsmall"):
            _list(project)
        with st.popover(_("Votes"), icon=":material/how_to_vote:"):
            tally_view(project)
        if chat:
            st.markdown(f"**{plain(chat.title)}**", width="stretch")
            with st.popover("", icon=":material/more_horiz:", type="tertiary", help=_("Rename, export, delete")):
                _chat_menu(project, chat)


def _list(project: Project) -> None:
    words = st.text_input(
        _("Search"), key="compare.search", icon=":material/search:", width=420,
        placeholder=_("A word of a title, question or answer"),
    )  # fmt: skip
    found = chats.listed(project, words or "")
    if not found:
        st.caption(_("Nothing was found.") if words else _("What you ask is kept here."))
    for chat in found[:MOST_SHOWN]:
        st.button(
            f"{plain(chat.title)} :small[:gray[{plain(ago(chat.updated_at))} · {_columns(chat)}]]",
            key=f"compare.open.{chat.id}", type="tertiary", on_click=chat_state.open_it, args=(chat,),
        )  # fmt: skip
    if len(found) > MOST_SHOWN:
        st.caption(_("and {number} more").format(number=len(found) - MOST_SHOWN))


def _columns(chat: Chat) -> str:
    number = len(chat.labels)
    return ngettext("{number} column", "{number} columns", number).format(number=number)


def _chat_menu(project: Project, chat: Chat) -> None:
    title = st.text_input(_("Title"), chat.title, key=f"compare.title.{chat.id}", width=420)
    with guarded():
        if st.button(_("Rename"), key="compare.rename", disabled=title == chat.title):
            chats.rename(project, chat.id, title)
            st.rerun()
        st.caption(_("Export"))
        _exports(project, chat)
        sure = st.checkbox(_("Delete it with all its branches"), key=f"compare.sure.{chat.id}")
        if st.button(_("Delete"), icon=":material/delete:", key="compare.delete", disabled=not sure):
            chat_state.leave()
            chats.delete(project, chat.id)
            st.rerun()


def _exports(project: Project, chat: Chat) -> None:
    """The branch that is open as a page or as Markdown; all branches as JSON."""
    with st.container(horizontal=True):
        for kind, name in chat_export.FORMATS.items():
            st.download_button(
                name, lambda kind=kind: chat_export.exported(project, chat.id, kind),
                file_name=f"{slugify(chat.title)}.{kind}", icon=":material/download:", key=f"compare.export.{kind}",
                on_click="ignore",
            )  # fmt: skip
