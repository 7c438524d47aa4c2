"""What the studio remembers of a browser session: the project and the page's own values, by our own keys.

A widget's value is lost when its page is left; what must outlive that is kept here, and the project in the address too.
"""

from collections.abc import Collection
from typing import Any

import streamlit as st

from studio.projects import Project, list_projects
from studio.ui.i18n import LANGUAGE_KEY

PROJECT_KEY = "studio.project"
PREFIX = "kept."


def current_project(projects: list[Project]) -> Project | None:
    """The project that the address names, else the session's, else the newest; None when there is none at all."""
    by_slug = {project.slug: project for project in projects}
    for slug in (st.query_params.get("project", ""), st.session_state.get(PROJECT_KEY, "")):
        if slug in by_slug:
            return by_slug[slug]
    return projects[0] if projects else None


def choose_project(slug: str) -> None:
    """Work in this project from now on, on every page of the session."""
    st.session_state[PROJECT_KEY] = slug
    st.query_params["project"] = slug


def forget_project() -> None:
    """Leave a project that was archived or deleted."""
    st.session_state.pop(PROJECT_KEY, None)
    st.query_params.pop("project", None)


def address() -> dict[str, str]:
    """Query parameters that links between pages carry along."""
    values = {"project": st.session_state.get(PROJECT_KEY, ""), "lang": st.session_state.get(LANGUAGE_KEY, "")}
    return {key: value for key, value in values.items() if value}


def keep(name: str, value: Any) -> None:
    """Remember a page's value for the session, apart for each project; `name` begins with the page's name."""
    st.session_state[_key(name)] = value


def kept(name: str, default: Any = None) -> Any:
    """What `keep` remembered, or the default."""
    return st.session_state.get(_key(name), default)


def forget(name: str) -> None:
    st.session_state.pop(_key(name), None)


def hold(names: Collection[str]) -> None:
    """Keep what was typed or picked in widgets whose keys begin with one of these names: Streamlit forgets it when they
    are not drawn. Buttons and chat boxes (`….question`) may not be given a value, so truth values are left alone."""
    for key, value in st.session_state.items():
        may_be_set = isinstance(value, str | int | float | list) and not isinstance(value, bool)
        if may_be_set and str(key).partition(".")[0] in names and not str(key).endswith(".question"):
            st.session_state[key] = value


def flash(message: str) -> None:
    """Say something once, on the next run of any page."""
    st.session_state.setdefault("studio.flash", []).append(message)


def show_flashes() -> None:
    for message in st.session_state.pop("studio.flash", []):
        st.toast(message, icon=":material/check_circle:")


def projects_of_session() -> list[Project]:
    """The projects to choose from; an archived one only while the address names it."""
    named = st.query_params.get("project", "")
    return [project for project in list_projects(archived=True) if not project.archived_at or project.slug == named]


def _key(name: str) -> str:
    return f"{PREFIX}{st.session_state.get(PROJECT_KEY, '')}.{name}"
