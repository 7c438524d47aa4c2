"""What a person cannot prevent: a page server that dies, another language."""

import re
import signal

import psutil
import pytest
from playwright.sync_api import Locator, Page, expect

from studio import datasets, jobs, runs
from studio.config.catalog import preset
from studio.config.yaml import save_config, with_settings
from studio.data.identity import Identity
from studio.projects import Project, create_project, list_projects, open_project
from studio.store import jobs as store_jobs
from tests.browser import workspace
from tests.browser.conftest import Studio, Visitor, to_page

pytestmark = pytest.mark.browser

JOB_MS = 180_000


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
