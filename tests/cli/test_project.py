"""`retune project`: workspaces from the shell, whatever they are called."""

import json
from pathlib import Path

import pytest

from studio.projects import list_projects
from studio.store import jobs, open_db
from studio.store.jobs import Job
from tests.cli.conftest import Retune

HOSTILE = [
    "../../etc",
    "/etc/passwd",
    "露娜的学校 🌙",
    "[bold]x[/bold]",
    "a; rm -rf /",
    "CON",
    "..",
    "x" * 500,
    "<b>hi</b>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_makes_a_project_below_home(name: str, retune: Retune, own_home: Path) -> None:
    retune("project", "new", "--", name)
    (made,) = list_projects()
    assert made.folder.resolve().parent == (own_home / "projects").resolve()
    assert made.slug.replace("-", "").isalnum() and made.slug.isascii()
    (shown,) = json.loads(retune("project", "list", "--json"))
    assert shown["slug"] == made.slug and shown["name"] == made.name


def test_control_characters_do_not_reach_the_terminal(retune: Retune) -> None:
    retune("project", "new", "a\x1b[31mred\x07")
    assert "\x1b" not in retune("project", "list") and "\x07" not in retune("project", "list")


def test_two_projects_of_one_name_get_two_folders(retune: Retune) -> None:
    assert "luna " in retune("project", "new", "Luna")
    assert "luna-2 " in retune("project", "new", "Luna")


def test_a_name_of_nothing_is_refused(retune: Retune) -> None:
    assert "needs a name" in retune("project", "new", " \t", code=1)


def test_show_says_what_is_there_and_what_comes_next(retune: Retune) -> None:
    retune("project", "new", "Luna")
    assert "retune data identity" in retune("project", "show", "luna")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 5)
    assert "identity" in retune("project", "show", "luna")
    assert json.loads(retune("project", "show", "luna", "--json"))["datasets"][0]["num_rows"] == 5


def test_archive_hides_and_undo_shows(retune: Retune) -> None:
    retune("project", "new", "Luna")
    retune("project", "archive", "luna")
    assert "luna" not in retune("project", "list")
    assert "archived" in retune("project", "list", "--archived")
    retune("project", "archive", "luna", "--undo")
    assert "luna" in retune("project", "list")


def test_delete_asks_first(retune: Retune) -> None:
    retune("project", "new", "Luna")
    retune("project", "delete", "luna", answer="n\n", code=1)
    assert len(list_projects()) == 1
    retune("project", "delete", "luna", answer="y\n")
    assert list_projects() == []


def test_with_two_projects_of_one_name_the_slug_says_which(retune: Retune) -> None:
    for _ in range(2):
        retune("project", "new", "Luna!")
    for command in ("delete", "archive", "show"):
        assert "luna, luna-2" in retune("project", command, "Luna!", code=1)
    retune("project", "archive", "luna-2")
    retune("project", "delete", "luna", "--yes")
    assert [project.slug for project in list_projects(archived=True)] == ["luna-2"]


def test_delete_is_refused_while_a_job_is_live(retune: Retune) -> None:
    retune("project", "new", "Luna")
    (made,) = list_projects()
    with open_db(made.folder) as db:
        jobs.add(db, Job(kind="train"))
    assert "running job" in retune("project", "delete", "luna", "--yes", code=1)
    assert made.folder.is_dir()


@pytest.mark.parametrize("command", ["show", "archive", "delete"])
@pytest.mark.parametrize("name", ["nothere", "../../etc", ""])
def test_a_project_that_is_not_there_is_named(command: str, name: str, retune: Retune) -> None:
    retune("project", "new", "Luna")
    said = retune("project", command, name, code=1)
    assert "no project" in said and "luna" in said


def test_without_a_project_the_first_step_is_shown(retune: Retune) -> None:
    for words in (["data", "list"], ["runs", "list"], ["train", "starter_lora"], ["checkpoints", "list"]):
        assert "retune project new" in retune(*words, code=1)
