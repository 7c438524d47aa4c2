"""The queue: jobs of all projects that wait for the device, and what may be done with each."""

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from studio import jobs
from studio.store.jobs import Job
from studio.ui.i18n import _
from studio.ui.widgets import guarded, kind_word, plain


def queue_view(key: str) -> None:
    """Draw the queue; nothing while no job waits."""
    line = jobs.waiting()
    if not line:
        return
    st.markdown(f"**{_('Waiting in line')}**")
    st.caption(_("One job at a time has the device; the next one begins by itself."))
    for place, (folder, job) in enumerate(line):
        with st.container(border=True, gap="xsmall", key=f"{key}.{job.id}"):
            _job(folder, job, place, len(line), f"{key}.{job.id}")


def _job(folder: Path, job: Job, place: int, number: int, key: str) -> None:
    about = plain(job.run_id or job.title)
    held = f" · {_('held')}" if job.held else ""
    st.markdown(f"{place + 1}. **{about}**  \n:small[{plain(folder.name)} · {kind_word(job.kind)}{held}]")
    with st.container(horizontal=True, gap="xsmall"):
        _button(":material/arrow_upward:", _("Earlier"), f"{key}.up", place == 0, jobs.move, folder, job.id, "up")
        _button(
            ":material/arrow_downward:", _("Later"), f"{key}.down", place + 1 == number,
            jobs.move, folder, job.id, "down",
        )  # fmt: skip
        if job.held:
            _button(":material/play_arrow:", _("Release"), f"{key}.go", False, jobs.hold, folder, job.id, False)
        else:
            _button(":material/pause:", _("Hold: others pass it"), f"{key}.hold", False, jobs.hold, folder, job.id)
        _button(":material/close:", _("Take it out of the line"), f"{key}.cancel", False, jobs.stop, folder, job.id)


def _button(icon: str, help: str, key: str, disabled: bool, action: Callable[..., object], *args: object) -> None:
    # Without borders all four stand on one line of the narrow column.
    st.button(
        "", icon=icon, help=help, key=key, disabled=disabled, on_click=_call, args=(action, *args), type="tertiary"
    )


def _call(action: Callable[..., object], *args: object) -> None:
    with guarded():
        action(*args)
