"""Base models on the pages: getting one that is not on this machine yet, and choosing among those a project has."""

from collections.abc import Callable, Sequence

import streamlit as st

from studio import jobs, models
from studio.paths import system_folder
from studio.projects import Project
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.dialogs import redraw_page
from studio.ui.i18n import _
from studio.ui.model_code_view import offer_code
from studio.ui.told import told
from studio.ui.widgets import guarded, plain, show_progress

PROGRESS_SECONDS = 1.0
PICKER_WIDTH = 420


def offer_model(base: str, key: str) -> None:
    """What a base model needs before it can be loaded: a button that gets it, its job's progress, or, once it is
    here, consent to code that it brings. Nothing for most models that are here, and for folders that lack something."""
    model = models.resolve(base)
    if model.present or model.kind == "folder":
        return offer_code(base, key)
    job = _newest_fetch(base)
    if job and job.live:
        st.fragment(_progress, run_every=PROGRESS_SECONDS)(job.id)
        return None
    if job and job.state in ("failed", "lost"):
        st.error(plain(told(job.cause)), icon=":material/error:")
    st.button(
        _("Get the model"), type="primary", icon=":material/download:", key=key, on_click=_fetch, args=(base,)
    )  # fmt: skip
    return None


def choose_base(project: Project, bases: Sequence[str], page: str, on_change: Callable[[], None]) -> str:
    """The one of `bases` to work with: the project's own at first. There is a choice only where there are several."""
    wish = state.kept(f"{page}.base", project.base)
    chosen = wish if wish in bases else bases[0]
    if len(bases) > 1:
        key = f"{page}.base"
        st.session_state[key] = chosen
        st.selectbox(_("Base model"), bases, key=key, width=PICKER_WIDTH, on_change=_keep_base, args=(key, on_change))
    return chosen


def _keep_base(key: str, on_change: Callable[[], None]) -> None:
    state.keep(key, st.session_state[key])
    on_change()


def _newest_fetch(base: str) -> Job | None:
    with open_db(system_folder()) as db:
        found = [job for job in store_jobs.listed(db, kind="fetch") if job.args.get("base") == base]
    return jobs.get(system_folder(), found[0].id) if found else None


def _fetch(base: str) -> None:
    """Another window may have begun to get it: then that job is watched."""
    with guarded():
        job = _newest_fetch(base)
        if job is None or not job.live:
            jobs.start(system_folder(), "fetch", {"base": base}, title=f"fetch {base}", needs_device=False)


@guarded()
def _progress(job_id: str) -> None:
    job = jobs.get(system_folder(), job_id)
    if not job.live:
        redraw_page()
    show_progress(job)
