"""Home: empty, filled, a damaged project, deleting, the starter model, running jobs, Chinese."""

import os

import psutil
import pytest

from studio.paths import models_root
from studio.projects import Project, create_project, list_projects, open_project
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store.jobs import Job
from studio.ui.widgets import plain


def texts(elements) -> str:
    return "\n".join(str(element.value) for element in elements)


def add_live_job(project: Project, **values) -> Job:
    """A job row whose process is this very test: alive for as long as it is looked at."""
    process = psutil.Process(os.getpid())
    job = Job(
        kind="train", run_id="luna-1", state="running", phase="training", current=12, total=60, unit="steps",
        pid=process.pid, process_created=process.create_time(), **values,
    )  # fmt: skip
    with open_db(project.folder) as db:
        return store_jobs.add(db, job)


def test_first_visit_asks_for_a_name_and_leads_to_data(open_page):
    at = open_page()
    assert "Give a chat model a name" in texts(at.markdown)
    at.text_input(key="home.name").input("Luna 小月 🌙")
    at.button(key="home.create").click().run()
    assert not at.exception
    assert [project.name for project in list_projects()] == ["Luna 小月 🌙"]
    assert (
        at.query_params["project"] == [list_projects()[0].slug] or at.query_params["project"] == list_projects()[0].slug
    )
    assert at.title[0].value.endswith("Data")


def test_an_empty_name_is_refused_with_what_to_do(open_page):
    at = open_page()
    at.text_input(key="home.name").input("   ")
    at.button(key="home.create").click().run()
    assert not at.exception
    assert at.error and not list_projects()


def test_a_new_project_may_stand_on_any_base_model(open_page, no_models):
    at = open_page()
    at.text_input(key="home.name").input("Luna")
    type_base(at, "owner/name")
    at.button(key="home.create").click().run()
    assert not at.exception and [project.base for project in list_projects()] == ["owner/name"]
    at.switch_page("app.py").run()
    assert "Get the base model owner/name" in texts(at.markdown) and at.button(key="home.fetch")


def test_what_names_no_base_model_is_refused(open_page, no_models):
    at = open_page()
    at.text_input(key="home.name").input("Luna")
    type_base(at, "no such *model*")
    at.button(key="home.create").click().run()
    assert plain("no such *model*") in texts(at.error) and not list_projects()


def type_base(at, base: str) -> None:
    """As the browser sends what was typed: the options then hold it."""
    box = at.selectbox(key="home.base")
    box.options.append(base)
    box.set_value(base)


def test_pages_without_a_project_lead_home(open_page):
    at = open_page("pages/1_Data.py")
    assert "no project yet" in texts(at.info)
    at.button(key="studio.lead_home").click().run()
    assert at.title[0].value.endswith("Home")


def test_a_hostile_name_is_shown_as_text(open_page):
    name = "<b>x</b> **bold** :smile: [a](http://b) $x$"
    create_project(name)
    at = open_page()
    shown = texts(at.markdown)
    assert plain(name) in shown
    assert "**bold**" not in shown.replace(plain(name), "") and ":smile:" not in shown


def test_next_step_is_data_first_then_config(open_page, project):
    from studio import datasets
    from studio.data.formats import Conversation, Message
    from studio.data.identity import Identity

    assert open_page().button(key="home.next").label == "Next: Data"
    datasets.build_identity(project, Identity("Luna", "Shane"), 20)
    row = Conversation((Message("user", "2+2?"), Message("assistant", "4")))
    datasets.save(project, "general", [row], kind="general")
    assert open_page().button(key="home.next").label == "Next: Config"


def test_deleting_needs_the_name_typed(open_page, project):
    at = open_page()
    assert at.button(key="home.delete.luna").disabled
    at.text_input(key="home.sure.luna").input("luna").run()
    at.button(key="home.delete.luna").click().run()
    assert not at.exception and not list_projects(archived=True)


def test_a_project_with_a_live_job_is_not_deleted(open_page, project):
    add_live_job(project)
    at = open_page()
    at.text_input(key="home.sure.luna").input("luna").run()
    at.button(key="home.delete.luna").click().run()
    assert "running job" in texts(at.error) and open_project("luna")


def test_archiving_hides_and_showing_again_brings_back(open_page, project):
    at = open_page()
    at.button(key="home.archive.luna").click().run()
    assert not list_projects() and list_projects(archived=True)
    at.button(key="home.archive.luna").click().run()
    assert [each.slug for each in list_projects()] == ["luna"]


def test_running_jobs_are_on_every_page_with_a_stop_button(open_page, project):
    job = add_live_job(project)
    for path in ("app.py", "pages/2_Config.py"):
        at = open_page(path)
        assert "12 / 60 steps" in texts_of_progress(at)
        assert at.sidebar.button(key=f"studio.job.{job.id}.stop").label == "Stop"
    at.sidebar.button(key=f"studio.job.{job.id}.stop").click().run()
    assert not at.exception
    with open_db(project.folder) as db:
        assert store_jobs.get(db, job.id).stop_request == "save"


def texts_of_progress(at) -> str:
    return "\n".join(element.proto.text for element in at.get("progress"))


def test_a_damaged_database_shows_its_cause_and_hides_no_other_project(open_page, project):
    create_project("Other")
    (project.folder / "studio.db").write_bytes(b"not a database" * 100)
    at = open_page(project="other")
    assert "cannot be used" in texts(at.markdown)
    assert at.button(key="home.next")


@pytest.fixture
def no_models(tmp_path, monkeypatch):
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "models"))


def test_the_starter_model_is_offered_while_it_is_absent(open_page, no_models):
    assert not models_root().exists()
    assert open_page().button(key="home.fetch").label == "Get the model"


def test_in_chinese(open_page, project):
    at = open_page(lang="zh")
    assert at.title[0].value.endswith("首页")
    assert at.button(key="home.next").label == "下一步：数据"


def test_the_project_of_the_address_is_the_one_in_use(open_page, project):
    create_project("Newer")
    at = open_page(project="luna")
    assert at.sidebar.selectbox(key="studio.project_picker").value == "luna"
    at.switch_page("pages/1_Data.py").run()
    assert at.sidebar.selectbox(key="studio.project_picker").value == "luna"


def test_projects_of_one_name_are_kept_apart(open_page, project):
    second, third = create_project("Luna"), create_project("Luna")
    at = open_page("pages/1_Data.py", project=second.slug)
    picker = at.sidebar.selectbox(key="studio.project_picker")
    assert picker.value == second.slug and len(set(picker.options)) == 3
    picker.select(third.slug).run()
    assert at.query_params["project"] in (third.slug, [third.slug])
