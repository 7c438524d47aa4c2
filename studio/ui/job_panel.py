"""A job inside a page: its progress while it goes on, its cause when it failed. Redraws itself, then the page."""

from pathlib import Path
from typing import Any

import streamlit as st

from studio import jobs
from studio.store.jobs import Job
from studio.ui.dialogs import redraw_page
from studio.ui.i18n import _
from studio.ui.told import told
from studio.ui.widgets import guarded, kind_word, plain, show_progress, stop_button

LIVE_SECONDS = 1.0
LOG_LINES = 60


def newest_job(folder: Path, kind: str, **wanted: Any) -> Job | None:
    """The newest job of a kind whose args hold all of `wanted`."""
    for job in jobs.refresh(folder):
        if job.kind == kind and all(job.args.get(name) == value for name, value in wanted.items()):
            return job
    return None


def job_panel(folder: Path, job: Job | None, key: str) -> None:
    """Nothing for no job or one that ended well; a bar for a live one; the cause and the log's end for a failed one."""
    if job is None or job.state == "finished":
        return
    if job.live:
        st.fragment(_live_panel, run_every=LIVE_SECONDS)(folder, job.id, key)
        return
    words = f"**{kind_word(job.kind)}** · {plain(told(job.cause) or job.state)}"
    if job.state == "stopped":
        st.info(words, icon=":material/stop_circle:")
        return
    st.error(words, icon=":material/error:")
    if job.log_path:
        with st.expander(_("Log")):
            st.code(jobs.tail(Path(job.log_path), LOG_LINES), language=None, height=220, wrap_lines=True)


def _live_panel(folder: Path, job_id: str, key: str) -> None:
    with guarded():
        job = jobs.get(folder, job_id)
        if not job.live:
            redraw_page()
        with st.container(border=True, gap="xsmall"):
            st.markdown(f"**{kind_word(job.kind)}** {plain(job.run_id)}")
            show_progress(job)
            stop_button(folder, job, f"{key}.{job_id}")
