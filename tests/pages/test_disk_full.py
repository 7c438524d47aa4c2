"""While the disk is full the database cannot even be read: every page says so, in a sentence that helps."""

import sqlite3
from pathlib import Path

import pytest
import streamlit as st

from studio import store
from studio.paths import REPOSITORY
from studio.projects import Project
from studio.ui import base_model, compare_view, data_distill, recipe_view, serve_view

PAGES = ["app.py", *(f"pages/{path.name}" for path in sorted((REPOSITORY / "pages").glob("*.py")))]
REDRAWN = {  # parts that look again by themselves, when no page stands around them
    "fetch": lambda _: base_model._progress("job-1"),
    "compare": lambda project: compare_view._wait(project, "job-1"),
    "distill": lambda project: data_distill._watch(project, "job-1"),
    "recipe": lambda project: recipe_view._progress(project, ["job-1"]),
    "serve": lambda project: serve_view._wait(project, "job-1"),
}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """Call it, and the disk is full."""

    def connect(path: Path):
        raise store._translated(sqlite3.OperationalError("database or disk is full"), path)

    return lambda: monkeypatch.setattr(store, "_connect", connect)


@pytest.mark.parametrize("page", PAGES)
def test_each_page_says_so(open_page, project: Project, full, page: str) -> None:
    at = open_page()
    full()
    (at.run if page == "app.py" else at.switch_page(page).run)()
    assert not at.exception
    assert "The disk is full; free some space, nothing that was stored is lost" in at.error[0].value


@pytest.mark.parametrize("part", REDRAWN)
def test_so_does_what_is_redrawn_by_itself(project: Project, full, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(st, "error", lambda text, **_: said.append(text))
    full()
    REDRAWN[part](project)
    assert "free some space" in said[0]
