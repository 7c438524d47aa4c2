"""Dialogs that stay open while the page behind them has news: a run of the whole page would close them."""

from collections.abc import Callable
from typing import Any

import streamlit as st

KEY = "studio.dialog"


def dialog(title: str, content: Callable[..., None], *args: Any, **look: Any) -> None:
    """Open it; `look` are settings of `st.dialog`. `content` gets `args`."""
    st.session_state[KEY] = True
    st.dialog(title, on_dismiss=_closed, **look)(content)(*args)


def _closed() -> None:
    """Streamlit runs the page after this, which shows what was held back."""
    st.session_state.pop(KEY, None)


def page_begins() -> None:
    """The whole page is drawn anew, and any dialog is gone, unless it is opened again."""
    _closed()


def redraw_page() -> None:
    """For parts of a page that look again by themselves: run the whole page, but not under an open dialog."""
    if not st.session_state.get(KEY):
        st.rerun()
