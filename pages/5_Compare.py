"""Compare: ask base and checkpoints side by side, and read the scorecard."""

import streamlit as st

from studio.ui.frame import frame

project = frame("Compare", ":material/compare:")

from studio.ui.agent_view import agent_view
from studio.ui.compare_view import compare_view
from studio.ui.i18n import _
from studio.ui.runs_view import runs_view
from studio.ui.scorecard_view import scorecard_view
from studio.ui.widgets import guarded

side_by_side, scorecard, several_runs, with_tools = st.tabs(
    [_("Side by side"), _("Scorecard"), _("Runs"), _("With tools")]
)
with side_by_side, guarded():
    compare_view(project)
with scorecard, guarded():
    scorecard_view(project)
with several_runs, guarded():
    runs_view(project)
with with_tools, guarded():
    agent_view(project)
