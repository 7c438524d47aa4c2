"""The runs of a project, states as words; the chosen one stays chosen, in the session and in the address."""

from collections.abc import Sequence

import streamlit as st

from studio.store.jobs import LIVE_STATES
from studio.store.runs import Run
from studio.ui import state
from studio.ui.i18n import _
from studio.ui.widgets import ago, plain, state_word

NEW_RUN = ""
KEPT = "train.run"
KEPT_CONFIG = "train.config"
LIST_HEIGHT = 620


def choose_run(found: Sequence[Run]) -> str:
    """Draw the list; the id of the chosen run, or NEW_RUN."""
    by_id = {run.id: run for run in found}
    chosen = _chosen(found)
    st.session_state["train.choice"] = chosen
    if chosen:
        st.query_params["run"] = chosen
    else:
        st.query_params.pop("run", None)
    with st.container(height=LIST_HEIGHT if len(found) > 8 else "content", border=False):
        st.radio(
            _("Runs"),
            [NEW_RUN, *by_id],
            key="train.choice",
            format_func=lambda run_id: plain(run_id) if run_id else f":material/add: {_('New run')}",
            captions=["", *(_caption(run) for run in found)],
            on_change=lambda: state.keep(KEPT, st.session_state["train.choice"]),
        )
    return chosen


def prepare_new(config_name: str) -> None:
    """Have the Train page open on a new run of this config."""
    state.keep(KEPT, NEW_RUN)
    state.keep(KEPT_CONFIG, config_name)


def _chosen(found: Sequence[Run]) -> str:
    """What was chosen in this session or is named in the address, else the run at work, one in line, the newest."""
    known = {run.id for run in found} | {NEW_RUN}
    for wish in (state.kept(KEPT), st.query_params.get("run") or None):
        if wish is not None and wish in known:
            return wish
    ordered = sorted(found, key=lambda run: (run.state not in LIVE_STATES, run.state == "queued"))
    return ordered[0].id if ordered else NEW_RUN


def _caption(run: Run) -> str:
    """A live run's step is told beside, where it moves."""
    parts = [state_word(run.state) or _("not started"), ago(run.created_at)]
    if run.state not in LIVE_STATES and run.num_steps:
        parts.insert(1, f"{run.step} / {run.num_steps}")
    return plain(" · ".join(parts))
