"""What happened to a run besides its numbers, as the Train page tells it: newest last."""

from collections.abc import Sequence

import streamlit as st

from studio.store.run_events import RunEvent
from studio.ui.event_words import sentence, together
from studio.ui.i18n import _
from studio.ui.widgets import plain

ICONS = {
    "bad_step": ":material/warning:",
    "save_put_off": ":material/disc_full:",
    "smaller_micro_batch": ":material/memory:",
    "computed_twice": ":material/memory:",
    "early_stop": ":material/flag:",
    "rows_missing": ":material/warning:",
    "passed_over": ":material/warning:",
    "valid_not_finite": ":material/warning:",
}
SHOWN_EVENTS = 6


def events_view(events: Sequence[RunEvent]) -> None:
    """Draw them; nothing for none."""
    if not events:
        return
    lines = [_line(group) for group in together(events)]
    st.markdown(f"**{_('What happened')}**")
    for line in lines[-SHOWN_EVENTS:]:
        st.markdown(line)
    if len(lines) > SHOWN_EVENTS:
        with st.expander(_("Earlier")):
            for line in lines[:-SHOWN_EVENTS]:
                st.markdown(line)


def _line(group: Sequence[RunEvent]) -> str:
    icon = ICONS.get(group[0].kind, ":material/info:")
    return f"{icon} {plain(sentence(group))}"
