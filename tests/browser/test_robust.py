"""What a person cannot prevent: a page server that dies, strangers' text, another language."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from playwright.sync_api import Locator, Page, expect

from studio import datasets, jobs, runs
from studio.config.catalog import preset
from studio.config.yaml import save_config, with_settings
from studio.data.identity import Identity
from studio.projects import Project, create_project, list_projects, open_project
from studio.store import jobs as store_jobs
from studio.store import open_db
from tests.browser import workspace
from tests.browser.conftest import Studio, Visitor, drawn, to_page
from tests.pages.model_server import ModelServer

pytestmark = pytest.mark.browser

JOB_MS = 180_000
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>"
MARKDOWN = (
    "![p](http://198.51.100.7/p.png) [l](javascript:alert(3)) $\\href{javascript:alert(4)}{k}$ :smile: "
    "<iframe src='http://198.51.100.7/'></iframe>"
)
NEVER = "img[src*='198.51.100.7'], iframe[src*='198.51.100.7'], a[href^='javascript'], img[onerror]"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_page_server_leaves_the_run_alone(studio: Studio, visitor: Visitor, starter, wait_for) -> None:
    project = ready_to_train()
    page = visitor.open(f"/Train?project={project.slug}")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", name="endless-1")).to_be_visible()
    wait_for(lambda: runs.get_run(project, "endless-1").step >= 1, 120, "the first step")
    before = the_job(project)

    visitor.leave(page)
    studio.end(signal.SIGKILL)
    wait_for(lambda: the_job(project).current > before.current + 1, 60, "two more steps without a page server")
    studio.start()
    page = visitor.open(f"/Train?project={project.slug}")
    expect(main(page).get_by_text(re.compile(r"step \d+ of \d+")).first).to_be_visible()
    after = the_job(project)
    assert (after.id, after.pid, after.process_created) == (before.id, before.pid, before.process_created)
    assert psutil.pid_exists(after.pid)

    main(page).get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Save and stop").click()
    expect(page.get_by_role("button", name=re.compile("Resume from step"))).to_be_visible(timeout=JOB_MS)
    assert the_job(project).state == "stopped"


def ready_to_train() -> Project:
    """A project with a config that would train for hours, in small steps."""
    project = create_project("Luna")
    datasets.build_identity(project, Identity("Luna", "Shane"), num_rows=60)
    settings = [
        "name=endless", "data.sources={identity: 1}", "train.num_steps=5000", "train.micro_batch_size=1",
        "train.gradient_accumulation_steps=1", "record.evaluate_every_steps=0", "record.sample_every_steps=0",
        "record.sample_prompts=[]", "lora.rank=4",
    ]  # fmt: skip
    save_config(runs.config_path(project, "endless"), with_settings(preset("starter_lora"), settings))
    return project


def the_job(project: Project) -> store_jobs.Job:
    [job] = [job for job in jobs.refresh(project.folder) if job.kind == "train"]
    return job


def main(page: Page) -> Locator:
    return page.get_by_test_id("stMain")


@pytest.fixture
def speaking() -> Iterator[ModelServer]:
    """A model server whose every word is hostile."""
    server = ModelServer(["starter"])
    server.words = [HTML, " ", MARKDOWN]
    yield server
    server.close()


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process for rows of live jobs to name."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("text", [HTML, MARKDOWN], ids=["html", "markdown"])
def test_hostile_text_is_text_on_every_page(
    text: str, visitor: Visitor, speaking: ModelServer, owner: subprocess.Popen[bytes]
) -> None:
    project = create_project(text[:110])
    workspace.fill(project, said=text)
    serve(project, speaking, owner)
    page = visitor.open(f"/?project={project.slug}")
    shows(page, project.name)
    for label in ("Data", "Config", "Train", "Checkpoints", "Compare", "Serve"):
        to_page(page, label)
        page.wait_for_timeout(500)
        harmless(page)

    browse(page, text)
    to_page(page, "Train")
    shows(page, text)
    ask(page)
    shows(page, HTML + " " + MARKDOWN)
    page.get_by_role("tab", name="Scorecard").click()
    expect(page.get_by_text("Says it unasked").first).to_be_visible()
    harmless(page)


def serve(project: Project, server: ModelServer, owner: subprocess.Popen[bytes]) -> None:
    """Make the project know `server` as its own."""
    name = f"{workspace.RUN}-step_{workspace.NUM_STEPS}"
    path = runs.hf_folder(project, workspace.RUN, workspace.NUM_STEPS)
    server.models.append(name)
    job = store_jobs.Job(
        kind="serve", title="serve starter", state="running", pid=owner.pid, needs_device=False,
        process_created=psutil.Process(owner.pid).create_time(),
        args={"base": "starter", "adapters": [{"name": name, "path": str(path)}]},
    )  # fmt: skip
    folder = project.path("jobs", job.id)
    folder.mkdir(parents=True)
    connection = {"url": server.connection.url, "token": server.connection.token}
    (folder / "connection.json").write_text(json.dumps(connection))
    with open_db(project.folder) as db:
        store_jobs.add(db, job)


def browse(page: Page, text: str) -> None:
    to_page(page, "Data")
    page.get_by_role("radio", name="Browse and edit").click()
    page.get_by_role("radio", name="general").click()
    drawn(page)
    shows(page, text)


def ask(page: Page) -> None:
    to_page(page, "Compare")
    page.get_by_role("button", name="Load", exact=True).click()
    question = page.get_by_role("textbox", name="Ask all of them")
    expect(question).to_be_enabled()
    question.fill(MARKDOWN)
    question.press("Enter")
    expect(page.get_by_text("tokens/s")).to_have_count(2)


def shows(page: Page, text: str) -> None:
    """The text stands on the page letter by letter (joiners of no width aside), and nothing came of it."""
    expect(page.get_by_test_id("stApp")).to_be_visible()
    wanted = " ".join(text.split())
    page.wait_for_function(
        "wanted => document.body.innerText.replaceAll('\\u2060', '').replace(/\\s+/g, ' ').includes(wanted)",
        arg=wanted,
        timeout=20_000,
    )
    harmless(page)


def harmless(page: Page) -> None:
    expect(page.locator(NEVER)).to_have_count(0)
    drawn(page)


def test_a_project_cannot_be_named_out_of_its_folder(visitor: Visitor) -> None:
    page = visitor.open()
    page.get_by_label("Name of your first project").fill("../../etc")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Data")
    [project] = list_projects()
    assert (project.name, project.slug) == ("../../etc", "etc")
    assert open_project("etc").folder.parent.name == "projects"


def test_chinese_goes_along(visitor: Visitor) -> None:
    workspace.fill(create_project("月亮"))
    page = visitor.open()
    page.get_by_role("radio", name="中文").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("首页")
    for label in ("数据", "配置", "训练", "检查点"):
        to_page(page, label)
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_contain_text("检查点")
    page.get_by_role("radio", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Checkpoints")


def test_a_chinese_browser_is_answered_in_chinese(visitor: Visitor) -> None:
    page = visitor.open(locale="zh-CN")
    expect(page.get_by_role("heading", level=1)).to_contain_text("首页")
