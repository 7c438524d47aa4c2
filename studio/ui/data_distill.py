"""Data page, tab Keep: the base model answers general questions itself, so that training does not forget them."""

from collections import Counter
from pathlib import Path

import streamlit as st

from studio import datasets, jobs, models
from studio.data.general import LANGUAGES, general_prompts
from studio.projects import Project
from studio.store.jobs import Job
from studio.ui.base_model import offer_model
from studio.ui.data_build import dataset_line, preview_columns, preview_row
from studio.ui.dialogs import redraw_page
from studio.ui.i18n import LANGUAGES as LANGUAGE_NAMES
from studio.ui.i18n import _
from studio.ui.told import told
from studio.ui.widgets import guarded, plain, show_progress, state_label, stop_button

NAME = "general"
SHOWN_ROWS = 12


def distill_tab(project: Project) -> None:
    """Start the job, watch it, and see what came of it."""
    st.markdown(
        _(
            "A model that only learns its name says it to everything. Rows that the base model answered itself, "
            "mixed into training, keep what it knows."
        )
    )
    form, result = st.columns([5, 6], gap="large")
    job = _newest(project)
    with form:
        if not models.resolve(project.base).present:
            _needs_model(project)
        else:
            _settings(project, busy=bool(job and job.live))
    with result:
        if job and job.live:
            st.fragment(_watch, run_every=1.0)(project, job.id)
        else:
            _result(project, job)


def _newest(project: Project) -> Job | None:
    return next((job for job in jobs.refresh(project.folder) if job.kind == "distill"), None)


def _needs_model(project: Project) -> None:
    st.info(_("The base model {base} is not on this machine yet.").format(base=plain(project.base)))
    offer_model(project.base, "data.distill.fetch")


def _settings(project: Project, busy: bool) -> None:
    key = f"data.{project.slug}.distill"
    languages = st.pills(
        _("Languages"), LANGUAGES, selection_mode="multi", default=["en"], key=f"{key}.languages",
        format_func=lambda code: LANGUAGE_NAMES[code], persist_state="session",
    )  # fmt: skip
    prompts = general_prompts(languages) if languages else None
    left, right = st.columns(2)
    limit = left.number_input(
        _("Questions at most"), 0, 100_000, 0, key=f"{key}.limit", persist_state="session",
        help=_("0 asks all of them."),
    )  # fmt: skip
    longest = right.number_input(
        _("Longest answer in tokens"), 1, 4096, datasets.DEFAULT_MAX_NEW_TOKENS, key=f"{key}.tokens",
        persist_state="session",
    )  # fmt: skip
    if prompts:
        words = _("{train} questions to train on, {probes} others held out to measure what is forgotten.")
        st.caption(words.format(train=len(prompts.train), probes=len(prompts.held_out)))
    exists = NAME in {dataset.name for dataset in datasets.listed(project)}
    st.button(
        _("Ask again, in place of the old answers") if exists else _("Let the base model answer"),
        type="primary", icon=":material/forum:", key="data.distill.go", disabled=busy or not languages,
        on_click=_start, args=(project, list(languages), int(limit), int(longest)),
    )  # fmt: skip


def _start(project: Project, languages: list[str], limit: int, longest: int) -> None:
    with guarded():
        datasets.start_distill(project, languages, NAME, limit, longest)


@guarded()
def _watch(project: Project, job_id: str) -> None:
    job = jobs.get(project.folder, job_id)
    if not job.live:
        redraw_page()
    with st.container(border=True):
        show_progress(job)
        stop_button(project.folder, job, "data.distill")
        st.caption(_("It goes on when this page or the browser is closed."))


def _result(project: Project, job: Job | None) -> None:
    if job and job.state in ("failed", "lost", "stopped"):
        st.warning(f"{state_label(job.state)}: {plain(told(job.cause))}")
        with st.expander(_("Log")):
            st.code(jobs.tail(Path(job.log_path), 60) or _("empty"), language=None)
    dataset = next((each for each in datasets.listed(project) if each.kind == "general"), None)
    if dataset is None:
        st.info(_("No general dataset yet."), icon=":material/inbox:")
        return
    rows = datasets.load(project, dataset.name)
    languages = Counter(str(row.meta.get("language", "")) for row in rows)
    shares = ", ".join(f"{LANGUAGE_NAMES.get(code, code)} {count}" for code, count in languages.items())
    st.markdown(f"{dataset_line(dataset)} · {plain(shares)}")
    st.dataframe(
        [preview_row(row) for row in rows[:SHOWN_ROWS]],
        hide_index=True,
        column_config=preview_columns(),
        height="content",
    )
