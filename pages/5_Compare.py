"""Compare: ask base and checkpoints side by side, and read the scorecard."""

from studio.ui.frame import frame

project = frame("Compare", ":material/compare:")

from studio.ui import chat_state
from studio.ui.agent_view import agent_view
from studio.ui.compare_view import compare_view
from studio.ui.i18n import _
from studio.ui.runs_view import runs_view
from studio.ui.scorecard_view import scorecard_view
from studio.ui.widgets import guarded, tab_picker

TABS = {
    "chat": (_("Side by side"), compare_view),
    "scorecard": (_("Scorecard"), scorecard_view),
    "runs": (_("Runs"), runs_view),
    "tools": (_("With tools"), agent_view),
}
INPUTS = ("score", "suite", "runs", "agent")
chat_state.hold_settings()
chosen = "chat" if chat_state.demo_is_on() else tab_picker(TABS, "compare.tab", INPUTS)
with guarded():
    TABS[chosen][1](project)
