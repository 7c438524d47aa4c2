"""How to ask: system prompt, sampling alike or by column, blind columns, and the server's test of itself."""

from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from studio import chat_client
from studio.chat_client import Connection
from studio.ui import chat_state
from studio.ui.dialogs import dialog
from studio.ui.i18n import _
from studio.ui.widgets import guarded, plain


def settings_bar(labels: Mapping[str, str], connection: Connection, started: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover(_("Sampling"), icon=":material/tune:"):
            _sampling(labels)
        with st.popover(_("System prompt"), icon=":material/settings:"):
            st.text_area(_("System prompt"), key="compare.system", placeholder=_("None"), width=420)
        if st.button(_("Self-test"), icon=":material/verified:", key="compare.selftest",
                     help=_("Is the base still the base, with the adapters off?")):  # fmt: skip
            dialog(_("Self-test"), _self_test, labels, connection, width="medium")
        st.toggle(
            _("Blind"), key="compare.blind",
            help=_("The columns are shuffled and have no names until you have said which answer is better."),
        )  # fmt: skip
        st.button(
            _("Demo view"), icon=":material/slideshow:", key="compare.demo.on", on_click=chat_state.set_demo,
            args=(True,), help=_("The newest question in large type, without the side bar, for a projector."),
        )  # fmt: skip
        st.button(
            _("New conversation"), icon=":material/add_comment:", key="compare.clear", disabled=not started,
            on_click=chat_state.leave,
        )  # fmt: skip


def _sampling(labels: Mapping[str, str]) -> None:
    own = st.toggle(_("Each column its own"), key="compare.own")
    if not own:
        st.caption(_("The same for every column."))
        _controls(lambda name: f"compare.{name}")
        return
    for tab, model in zip(st.tabs([plain(label) for label in labels.values()]), labels, strict=True):
        same = chat_state.sampling()
        for name in chat_state.SAMPLING:
            key = chat_state.own_key(model, name)
            st.session_state[key] = st.session_state.get(key, getattr(same, name))
        with tab:
            _controls(lambda name, model=model: chat_state.own_key(model, name))


def _controls(key: Callable[[str], str]) -> None:
    st.number_input(_("Longest answer (tokens)"), 1, 4096, key=key("max_tokens"))
    st.slider(
        _("Temperature"), 0.0, 2.0, step=0.05, key=key("temperature"), help=_("0: always the likeliest word.")
    )  # fmt: skip
    st.slider(_("Top p"), 0.05, 1.0, step=0.05, key=key("top_p"))
    st.number_input(_("Seed"), 0, 2**31 - 1, key=key("seed"))


def _self_test(labels: Mapping[str, str], connection: Connection) -> None:
    """The figures as they were measured just now, and what they mean."""
    with guarded():
        with st.spinner(_("Comparing logits…")):
            found = chat_client.self_test(connection)
        if found["off"]["bit_equal"]:
            st.success(_("With every adapter off, the logits are the base's, bit for bit."), icon=":material/verified:")
        else:
            st.error(
                _("With every adapter off, the logits differ from the base's by up to {difference}.").format(
                    difference=f"{found['off']['max_difference']:.3g}"
                ),
                icon=":material/error:",
            )
        st.caption(
            _("Measured on {number} questions, against the base before any adapter was loaded.").format(
                number=found["num_questions"]
            )
        )
        for name, on in found["on"].items():
            st.markdown(_adapter_line(labels.get(name, name), on, found["beside"][name]))


def _adapter_line(label: str, on: dict[str, Any], beside: dict[str, Any]) -> str:
    """How far an adapter moves the logits, and how far its neighbourhood in a batch moves the base's."""
    words = _("on, it moves the logits by up to {on}; the base beside it in one batch differs by {beside}")
    return f"**{plain(label)}**: " + words.format(
        on=f"{on['max_difference']:.3g}", beside=f"{beside['max_difference']:.2g}"
    )
