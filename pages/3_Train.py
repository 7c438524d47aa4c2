"""Train: start a run, watch it, stop it, go on with it."""

import streamlit as st

from studio.ui.frame import frame

project = frame("Train", ":material/model_training:")

from studio import runs
from studio.ui import state
from studio.ui.i18n import _
from studio.ui.queue_view import queue_view
from studio.ui.run_list import KEPT, NEW_RUN, choose_run
from studio.ui.run_start import start_panel
from studio.ui.run_view import run_view
from studio.ui.widgets import guarded

with guarded():
    left, right = st.columns([1, 4], gap="medium")
    with left:
        chosen = choose_run(runs.list_runs(project))
        queue_view("train.queue")
    with right:
        if chosen != NEW_RUN:
            run_view(project, chosen)
        else:
            st.subheader(_("New run"), anchor=False)
            if started := start_panel(project):
                state.keep(KEPT, started.id)
                st.rerun()
