"""A page with news waits until a dialog is closed."""

from streamlit.testing.v1 import AppTest


def page() -> None:
    import streamlit as st

    from studio.ui import dialogs

    st.session_state["times_drawn"] = st.session_state.get("times_drawn", 0) + 1
    dialogs.page_begins()
    if st.button("Open", key="open"):
        dialogs.dialog("A question", st.text, "Still here")
    if st.session_state.pop("news", False):
        dialogs.redraw_page()


def test_news_redraw_the_page_but_not_under_an_open_dialog() -> None:
    at = AppTest.from_function(page).run()
    at.session_state["news"] = True
    at.run()
    assert at.session_state["times_drawn"] == 3
    at.session_state["news"] = True
    at.button(key="open").click().run()
    assert at.session_state["times_drawn"] == 4 and [text.value for text in at.text] == ["Still here"]
    at.session_state["news"] = True
    at.run()  # closed: Streamlit runs the page
    assert at.session_state["times_drawn"] == 6
