"""The demo view: large type and nothing but question and answers, for a projector."""

from pathlib import Path

import streamlit as st

from studio.ui import chat_state
from studio.ui.i18n import _

STYLE = Path(__file__).with_name("demo.css")


def demo_bar() -> None:
    """The look of a projector, and the way back."""
    st.html(STYLE)
    with st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center"):
        st.caption(_("F11 fills the screen."), width="content")
        st.toggle(_("Blind"), key="compare.blind")
        st.button(
            _("New conversation"), icon=":material/add_comment:", key="compare.clear", on_click=chat_state.leave
        )  # fmt: skip
        st.button(
            _("Leave the demo view"), icon=":material/close_fullscreen:", key="compare.demo.off",
            on_click=chat_state.set_demo, args=(False,),
        )  # fmt: skip
