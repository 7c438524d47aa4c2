"""Workspaces: any name is safe, nothing outside is touched, several studios get along."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from studio import processes, projects
from studio.errors import ProjectError
from studio.paths import REPOSITORY, projects_root, system_folder
from studio.projects import Project, archive_project, create_project, delete_project, list_projects, open_project
from studio.store import jobs, open_db
from studio.store.jobs import Job


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=60))
@example("../../etc")
@example("/etc/passwd")
@example("..")
@example("a\0b")
@example("con")
@example(".studio")
@example("\u202egpj.exe")
@example("露娜 🌙")
@example("\ud800")
@example("x" * 4000)
def test_any_name_makes_a_project_inside_the_root_or_is_refused(own_home: Path, name: str) -> None:
    before = {path for path in own_home.parent.iterdir() if path != own_home}
    try:
        project = create_project(name)
    except ProjectError as error:
        assert error.hint and not [c for c in name if c.isprintable() and not c.isspace() and c < "\ue000"]
        return
    assert project.folder.parent == projects_root() and project.folder.is_dir()
    assert project.folder.resolve().parent == projects_root().resolve()
    assert open_project(project.slug) == project
    assert {path for path in own_home.parent.iterdir() if path != own_home} == before
    delete_project(project.slug)
    assert not project.folder.exists()


def test_the_name_stays_as_typed_and_the_folder_is_safe() -> None:
    assert (create_project("../../etc").slug, create_project("../../etc").slug) == ("etc", "etc-2")
    moon = create_project("露娜 🌙")
    assert moon.name == "露娜 🌙" and moon.slug.isascii()
    assert json.loads((moon.folder / "project.json").read_text(encoding="utf-8"))["name"] == "露娜 🌙"


def test_what_cannot_be_seen_is_no_name() -> None:
    for name in ("", "   ", "\n\t", "\0", "\ud800"):
        with pytest.raises(ProjectError, match="needs a name"):
            create_project(name)


def test_a_name_is_one_line_that_reads_as_it_is() -> None:
    assert create_project("a\nb\r\x1b[31mc").name == "ab[31mc"
    assert create_project("safe\u202egpj.exe").name == "safegpj.exe"
    family = "👩\u200d👧"
    assert create_project(family).name == family


@pytest.mark.parametrize("path", ["../other/studio.db", "/etc/passwd", "runs/../../x", "evil/x"])
def test_paths_of_a_project_stay_inside(project: Project, path: str) -> None:
    (project.folder / "evil").symlink_to("/etc")
    with pytest.raises(ProjectError, match="outside"):
        project.path(path)


def test_relative_paths_are_what_the_database_holds(project: Project) -> None:
    assert project.relative(project.path("runs", "r-1", "step_2.pth")) == "runs/r-1/step_2.pth"


@pytest.mark.parametrize("slug", ["", "..", "../luna", ".studio", "nobody"])
def test_a_project_that_is_not_there(project: Project, slug: str) -> None:
    with pytest.raises(ProjectError, match="there are: luna"):
        open_project(slug)


def test_a_slug_is_itself_though_a_newer_project_bears_it_as_its_name() -> None:
    first, second = create_project("demo"), create_project("demo")
    assert (open_project("demo"), open_project("demo-2")) == (first, second)
    archive_project("demo")
    assert [project.slug for project in list_projects()] == ["demo-2"]
    delete_project("demo")
    assert list_projects() == [second] and second.folder.is_dir()


def test_a_name_of_two_projects_opens_neither() -> None:
    first, _second = create_project("Luna!"), create_project("Luna!")
    with pytest.raises(ProjectError, match="luna, luna-2.*slug"):
        open_project("Luna!")
    delete_project("luna-2")
    assert open_project("Luna!") == first


@pytest.mark.parametrize("change", [archive_project, delete_project])
def test_hiding_and_deleting_go_by_the_slug_alone(change: Callable[[str], object]) -> None:
    project = create_project("Luna's school")
    with pytest.raises(ProjectError, match="no project"):
        change("Luna's school")
    assert list_projects() == [project]


def test_a_deletion_that_was_cut_short_shows_no_project(project: Project) -> None:
    doomed = project.folder.rename(projects_root() / ".deleted-luna")
    assert list_projects(archived=True) == []
    again = create_project("Luna")
    delete_project(again.slug)
    assert not doomed.exists()


def test_archived_projects_are_hidden_and_can_come_back(project: Project) -> None:
    archive_project("luna")
    assert list_projects() == [] and [p.slug for p in list_projects(archived=True)] == ["luna"]
    assert open_project("luna").archived_at
    archive_project("luna", archived=False)
    assert list_projects() == [project]


def test_a_running_project_is_not_deleted(project: Project) -> None:
    with open_db(project.folder) as db:
        job = jobs.add(db, Job("train", pid=os.getpid(), process_created=processes.created(os.getpid())))
    with pytest.raises(ProjectError, match="running job"):
        delete_project("luna")
    assert project.folder.is_dir()
    with open_db(project.folder) as db:
        jobs.move(db, job.id, "failed", "x")
    delete_project("luna")
    assert list_projects() == [] and list(projects_root().glob("*luna*")) == []


def test_a_job_that_died_does_not_keep_its_project(project: Project) -> None:
    with open_db(project.folder) as db:
        jobs.add(db, Job("train", pid=os.getpid(), process_created=1.0))
    delete_project("luna")
    assert list_projects() == []


def test_deleting_follows_no_link(project: Project, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "canary").write_text("alive")
    (project.folder / "data" / "link").symlink_to(precious)
    delete_project("luna")
    assert (precious / "canary").read_text() == "alive"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"name": "x"}', "\ufeff{}"])
def test_a_folder_without_a_readable_card_is_no_project(project: Project, content: str) -> None:
    stray = projects_root() / "stray"
    stray.mkdir()
    (stray / "project.json").write_text(content, encoding="utf-8")
    (projects_root() / "file").write_text("")
    assert list_projects() == [project]


def test_machine_wide_jobs_are_no_project(project: Project) -> None:
    with open_db(system_folder()):
        pass
    assert list_projects() == [project]


def test_the_same_name_at_the_same_time_in_threads() -> None:
    made: list[Project] = []
    threads = [threading.Thread(target=lambda: made.append(create_project("Luna"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.slug for p in made) == ["luna", "luna-2", "luna-3", "luna-4", "luna-5", "luna-6"]


def test_the_same_name_at_the_same_time_in_processes(own_home: Path) -> None:
    code = "from studio.projects import create_project; print(create_project('Luna').slug)"
    environment = {**os.environ, "RETUNE_HOME": str(own_home)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment)
        for _ in range(3)
    ]
    slugs = [process.communicate(timeout=60)[0].decode().strip() for process in started]
    assert sorted(slugs) == ["luna", "luna-2", "luna-3"]
    assert {p.slug for p in list_projects()} == set(slugs)


def test_a_new_project_has_its_rooms(project: Project) -> None:
    assert all((project.folder / folder).is_dir() for folder in projects.FOLDERS)
    assert (project.folder / "studio.db").is_file()
