"""The datasets that a config says where to find and the project lacks: got with one button, with progress."""

import streamlit as st

from studio import jobs, runs
from studio.config.schema import RunConfig
from studio.projects import Project
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store.jobs import Job
from studio.ui.dialogs import redraw_page
from studio.ui.i18n import _
from studio.ui.told import told
from studio.ui.widgets import guarded, plain, show_progress

PROGRESS_SECONDS = 1.0


def offer_data(project: Project, config: RunConfig) -> None:
    """For each missing dataset a line where it comes from, its job's progress or cause; one button for all of them."""
    missing = runs.missing_recipes(project, config)
    if not missing:
        return
    newest = {name: _newest_import(project, name) for name in missing}
    if any(job and job.live for job in newest.values()):
        st.fragment(_progress, run_every=PROGRESS_SECONDS)(
            project, [job.id for job in newest.values() if job and job.live]
        )
        return
    for name, recipe in missing.items():
        st.caption(_("Dataset {name}: from {source}").format(name=plain(name), source=plain(recipe.source)))
        job = newest[name]
        if job and job.state in ("failed", "lost"):
            st.error(plain(told(job.cause)), icon=":material/error:")
    st.button(
        _("Get the data"), icon=":material/download:", key="config.data", on_click=_fetch, args=(project, config),
        help=_("Downloads or reads it, and makes datasets of this project."),
    )  # fmt: skip


def _newest_import(project: Project, name: str) -> Job | None:
    with open_db(project.folder) as db:
        found = [job for job in store_jobs.listed(db, kind="import") if job.args.get("name") == name]
    return jobs.get(project.folder, found[0].id) if found else None


def _fetch(project: Project, config: RunConfig) -> None:
    with guarded():
        for name, recipe in runs.missing_recipes(project, config).items():
            runs.start_fetch(project, name, recipe)


@guarded()
def _progress(project: Project, job_ids: list[str]) -> None:
    for job in [jobs.get(project.folder, job_id) for job_id in job_ids]:
        if not job.live:
            redraw_page()
        show_progress(job)
