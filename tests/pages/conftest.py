"""A page as the person opens it: from app.py, so that links between pages resolve, in a home of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from studio.paths import REPOSITORY
from studio.projects import Project, create_project

OpenPage = Callable[..., AppTest]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Projects of a test lie in its own folder."""
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)
    yield tmp_path


@pytest.fixture
def project() -> Project:
    return create_project("Luna")


@pytest.fixture
def open_page() -> OpenPage:
    """open_page("pages/1_Data.py", lang="zh") runs Home, then the page; an exception on the way fails the test."""

    def open(path: str = "app.py", lang: str = "", **query: str) -> AppTest:
        at = AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=60)
        for key, value in {"lang": lang, **query}.items():
            if value:
                at.query_params[key] = value
        at.run()
        assert not at.exception, at.exception
        if path != "app.py":
            at.switch_page(path).run()
            assert not at.exception, at.exception
        return at

    return open
