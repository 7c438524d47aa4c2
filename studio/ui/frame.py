"""What every page shows: its links, the project and language in use, running jobs. `frame()` is a page's first line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import streamlit as st

from studio import jobs
from studio.paths import REPOSITORY
from studio.projects import Project
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.dialogs import page_begins, redraw_page
from studio.ui.i18n import LANGUAGES, N_, _, language, set_language
from studio.ui.widgets import guarded, kind_word, plain, progress_text, stop_button

PRODUCT = "Retune Studio"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A file of our own: for a named icon the browser would ask a font server on the internet.
TAB_ICON = Path(__file__).with_name("icon.svg")
STYLE = Path(__file__).with_name("style.css")
LIVE_SECONDS = 2.0
IDLE_SECONDS = 10.0
SHOWN_JOBS = 4
LIVE_KEY = "studio.live_jobs"


@dataclass(frozen=True)
class Page:
    """A page of the studio; `title` is English and translated where it is shown."""

    path: str
    title: str
    icon: str


HOME = Page("app.py", N_("Home"), ":material/home:")
DATA = Page("pages/1_Data.py", N_("Data"), ":material/dataset:")
CONFIG = Page("pages/2_Config.py", N_("Config"), ":material/tune:")
TRAIN = Page("pages/3_Train.py", N_("Train"), ":material/model_training:")
CHECKPOINTS = Page("pages/4_Checkpoints.py", N_("Checkpoints"), ":material/inventory_2:")
COMPARE = Page("pages/5_Compare.py", N_("Compare"), ":material/compare:")
SERVE = Page("pages/6_Serve.py", N_("Serve"), ":material/dns:")
STEPS = (DATA, CONFIG, TRAIN, CHECKPOINTS, COMPARE, SERVE)
PAGES = (HOME, *STEPS)


@overload
def frame(title: str, icon: str, needs_project: Literal[True] = True) -> Project: ...
@overload
def frame(title: str, icon: str, needs_project: Literal[False]) -> Project | None: ...
def frame(title: str, icon: str, needs_project: bool = True) -> Project | None:
    """Draw the frame and return the project in use. Without any project, a page that needs one leads Home and stops."""
    page_begins()
    projects = state.projects_of_session()
    project = state.current_project(projects)
    st.set_page_config(_tab_title(title, project), layout="wide", menu_items={"About": PRODUCT})
    st.html(STYLE)
    # What follows takes longer, the icon most of all (Streamlit loads its image libraries): the heading shows before.
    st.title(f"{icon} {_(title)}", anchor=False)
    if project:
        state.choose_project(project.slug)
    with st.sidebar:
        _sidebar(projects, project)
    st.set_page_config(page_icon=TAB_ICON)
    state.show_flashes()
    _warn_if_open()
    if project is None and needs_project:
        _lead_home()
    return project


def go(page: Page) -> None:
    """Open another page; project and language go along."""
    st.switch_page(page.path, query_params=state.address())


def link(page: Page, label: str = "", help: str | None = None) -> None:
    """A link to another page; project and language go along."""
    if (REPOSITORY / page.path).is_file():
        st.page_link(
            page.path,
            label=label or _(page.title),
            icon=page.icon,
            help=help,
            width="stretch",
            query_params=state.address(),
        )


def _tab_title(title: str, project: Project | None) -> str:
    return " · ".join([_(title), *([project.name] if project else []), PRODUCT])


def _sidebar(projects: list[Project], project: Project | None) -> None:
    st.markdown(f"### :material/graphic_eq: {PRODUCT}")
    if project:
        _project_picker(projects, project)
    with st.container(gap="xsmall"):
        for page in PAGES:
            link(page)
    _running_jobs()
    _language_picker()


def _project_picker(projects: list[Project], project: Project) -> None:
    slugs = [each.slug for each in projects]
    labels = _labels(projects)
    st.session_state["studio.project_picker"] = project.slug
    st.selectbox(
        _("Project"),
        slugs,
        format_func=lambda slug: labels.get(slug, slug),
        key="studio.project_picker",
        on_change=lambda: state.choose_project(st.session_state["studio.project_picker"]),
    )


def _labels(projects: list[Project]) -> dict[str, str]:
    """Names by slug, each different: a select box tells its options apart by what they are called."""
    names = [each.name for each in projects]
    return {each.slug: each.name if names.count(each.name) == 1 else f"{each.name} ({each.slug})" for each in projects}


def _language_picker() -> None:
    st.session_state["studio.language_picker"] = language()
    st.segmented_control(
        _("Language"),
        list(LANGUAGES),
        format_func=lambda code: LANGUAGES[code],
        key="studio.language_picker",
        required=True,
        label_visibility="collapsed",
        on_change=lambda: set_language(st.session_state["studio.language_picker"]),
    )


def _running_jobs() -> None:
    """The status bar: what this machine is busy with, looked at again every few seconds."""
    with guarded():
        live = [job.id for _folder, job in jobs.live_jobs()]
        st.session_state[LIVE_KEY] = live
        st.fragment(_status, run_every=LIVE_SECONDS if live else IDLE_SECONDS)()


def _status() -> None:
    with guarded():
        live = jobs.live_jobs()
        if [job.id for _folder, job in live] != st.session_state.get(LIVE_KEY):
            redraw_page()  # a job began or ended: the page shows what that changed
        for folder, job in live[:SHOWN_JOBS]:
            with st.container(border=True, gap="xsmall", key=f"studio.job.{job.id}"):
                _status_of(folder.name, job)
                stop_button(folder, job, f"studio.job.{job.id}")
        if len(live) > SHOWN_JOBS:
            st.caption(_("and {number} more").format(number=len(live) - SHOWN_JOBS))


def _status_of(slug: str, job: Job) -> None:
    about = job.run_id or job.args.get("base") or job.args.get("dataset") or ""
    where = "" if slug.startswith(".") else f"{slug} · "
    st.markdown(f"**{kind_word(job.kind)}**  \n:small[{plain(where + str(about))}]")
    if job.total:
        st.progress(min(1.0, job.current / job.total), text=progress_text(job))
    else:
        st.caption(progress_text(job))  # waiting, loading, or a server that is ready: there is no way to go


def _warn_if_open() -> None:
    address = st.get_option("server.address")
    if address not in LOOPBACK:
        st.warning(
            _(
                "This studio listens on {address}: other machines can reach it, and it has no password. "
                "Start it with `--server.address 127.0.0.1`."
            ).format(address=plain(address or _("all addresses"))),
            icon=":material/public:",
        )


def _lead_home() -> None:
    st.info(_("There is no project yet. A project holds your data, configs, runs and results."))
    if st.button(_("Create a project"), type="primary", icon=":material/add:", key="studio.lead_home"):
        go(HOME)
    st.stop()
