"""Checkpoints: what runs have saved; convert, merge, verify, delete."""

import streamlit as st

from studio.ui.frame import TRAIN, frame, link

project = frame("Checkpoints", ":material/inventory_2:")

from studio.ui.checkpoint_import import import_view
from studio.ui.checkpoint_view import checkpoint_view, choose_row, load_rows
from studio.ui.i18n import _
from studio.ui.widgets import guarded

with guarded():
    rows = load_rows(project)
    if rows:
        checkpoint_view(project, choose_row(rows))
    else:
        st.info(_("No run has saved a checkpoint yet. A run saves one at its end, and whenever you ask it to."))
        link(TRAIN, _("Train one"))
    import_view(project, is_open=False)
