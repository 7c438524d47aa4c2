"""A run leaves the Train page as one file, comes back on Home, and is held against the first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio import jobs
from studio.bundles.content import open_bundle
from studio.projects import Project, delete_project, list_projects
from tests.bundles.conftest import RUN, Here, bundled_home, home, run_here, tiny, tiny_model
from tests.pages.conftest import OpenPage

__all__ = ["bundled_home", "home", "tiny", "tiny_model"]


@pytest.fixture
def later(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Pages run in a thread, where a job cannot listen to signals: what they start is done when this is called."""
    started: list[tuple[str, Path, Path]] = []

    def spawn(*job: Any) -> Here:
        started.append(job)
        return Here()

    def catch_up() -> None:
        while started:
            run_here(*started.pop(0))

    monkeypatch.setattr(jobs, "_spawn", spawn)
    return catch_up


def test_a_run_goes_into_a_file_and_comes_back(
    home: Path, tiny: Project, open_page: OpenPage, later: Callable[[], None]
) -> None:
    train = open_page("pages/3_Train.py", project=tiny.slug, run=RUN)
    assert not train.exception
    train.button(key="train.bundle.make").click().run()
    made = tiny.path("exports", f"{RUN}.bundle.zip")
    assert not train.exception and made.read_bytes() == (home / "tiny.zip").read_bytes()
    assert any(made.name in each.value for each in train.code)
    train.toggle(key="train.bundle.rows").set_value(False).run()
    assert not any(made.name in each.value for each in train.code), "a file with rows is not offered as one without"
    train.button(key="train.bundle.make").click().run()
    with open_bundle(tiny.path("exports", f"{RUN}.without-rows.bundle.zip")) as bundle:
        assert not bundle.manifest.has_rows

    start = open_page("app.py", project=tiny.slug)
    start.file_uploader(key="home.bundle").set_value(("tiny.zip", made.read_bytes(), "application/zip")).run()
    assert not start.exception and any("Rows inside: identity" in each.value for each in start.caption)
    start.text_input(key="home.bundle.name").set_value("Once more").run()
    start.button(key="home.bundle.start").click().run()
    [project] = [project for project in list_projects() if project.name == "Once more"]
    assert [job.kind for job in jobs.refresh(project.folder)] == ["train"]

    later()
    train = open_page("pages/3_Train.py", project=project.slug, run=RUN)
    assert not train.exception and any("Reproduced to the last bit" in each.value for each in train.success)
    assert any("Not compared yet" in each.value for each in train.success)
    train.button(key="train.reproduced.score").click().run()
    later()
    train = open_page("pages/3_Train.py", project=project.slug, run=RUN)
    assert not any("Not compared yet" in each.value for each in train.success)
    delete_project(project.slug)


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_a_file_that_is_no_bundle_is_told(home: Path, content: bytes, open_page: OpenPage) -> None:
    start = open_page("app.py")
    start.file_uploader(key="home.bundle").set_value(("odd.zip", content or b"PK", "application/zip")).run()
    assert not start.exception and any("not a whole zip" in each.value for each in start.error)
