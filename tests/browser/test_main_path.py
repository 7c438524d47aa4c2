"""The whole path in a real Chromium on the real starter model: from a name to a measured before and after."""

import re

import pytest
from playwright.sync_api import Page, expect

from studio import datasets, jobs, runs
from studio.projects import Project, open_project
from studio.store import checkpoints, evaluations, metrics, open_db
from tests.browser.conftest import Visitor, drawn, to_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NUM_STEPS = 48  # long enough to be watched on a busy machine
RUN = "starter_lora-1"
JOB_MS = 480_000
# In bfloat16 a near tie may fall the other way; then the page says so.
AGREES = re.compile(r"It (answers as|is) what was trained")


@pytest.mark.timeout(1800)
def test_from_a_name_to_a_scorecard(visitor: Visitor, starter, wait_for) -> None:
    page = visitor.open()
    project = make_project(page)
    build_identity(page, project)
    keep_what_it_knows(page, project)
    configure(page, project)
    start(page)
    watch_it_move(page, project)

    visitor.leave(page)
    page = visitor.open(f"/Train?project={project.slug}")
    expect(page.get_by_text(RUN).first).to_be_visible()
    watch_it_move(page, project)
    watch_it_finish(page, project)

    convert_and_merge(page, project)
    compare(page)
    score(page, project)
    come_home(page)


def make_project(page: Page) -> Project:
    page.get_by_label("Name of your first project").fill("Luna")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Data")
    drawn(page)
    return open_project("luna")


def type_into(page: Page, role: str, label: str, value: str) -> None:
    """Fill a field as a person does: type, then leave it; the page has taken it when its script has run."""
    field = page.get_by_role(role, name=label, exact=True)
    field.fill(value)
    field.press("Tab")
    page.wait_for_timeout(300)
    drawn(page)


def build_identity(page: Page, project: Project) -> None:
    type_into(page, "textbox", "Name of the assistant", "Luna")
    type_into(page, "textbox", "Who made it", "Shane")
    type_into(page, "spinbutton", "Rows", "120")
    page.get_by_role("button", name="Build the dataset").click()
    expect(page.get_by_text("Dataset identity: 120 rows to train on")).to_be_visible()
    assert len(datasets.load(project, "identity")) == 120


def keep_what_it_knows(page: Page, project: Project) -> None:
    page.get_by_role("radio", name="Keep what it knows").click()
    type_into(page, "spinbutton", "Questions at most", "8")
    type_into(page, "spinbutton", "Longest answer in tokens", "32")
    page.get_by_role("button", name="Let the base model answer").click()
    expect(page.get_by_role("button", name="Stop").first).to_be_visible()
    expect(page.get_by_role("button", name="Ask again, in place of the old answers")).to_be_enabled(timeout=JOB_MS)
    assert 0 < len(datasets.load(project, "general")) <= 8


def configure(page: Page, project: Project) -> None:
    """From the preset through the form: fewer steps, smaller steps, more often a look at what it says."""
    to_page(page, "Config")
    type_into(page, "spinbutton", "Number of steps", str(NUM_STEPS))
    type_into(page, "spinbutton", "Micro batch size", "4")
    type_into(page, "spinbutton", "Gradient accumulation steps", "1")
    type_into(page, "textbox", "Learning rate", "1e-3")
    type_into(page, "spinbutton", "Evaluate every steps", "12")
    type_into(page, "spinbutton", "Sample every steps", "0")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("button", name="Saved", exact=True)).to_be_visible()
    page.get_by_role("radio", name="YAML").click()
    expect(page.get_by_role("textbox", name="YAML")).to_have_value(re.compile(f"num_steps: {NUM_STEPS}"))
    page.get_by_role("radio", name="Form").click()
    assert runs.list_configs(project) == ["starter_lora"]


def start(page: Page) -> None:
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Train")
    drawn(page)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", name=RUN)).to_be_visible()


def watch_it_move(page: Page, project: Project) -> None:
    """The chart is there and the step on the page goes up, without anything being pressed."""
    expect(page.locator(".js-plotly-plot").first).to_be_visible(timeout=JOB_MS)
    progress = page.get_by_test_id("stMain").get_by_text(re.compile(r"step \d+ of"))
    expect(progress.first).to_be_visible(timeout=JOB_MS)
    first = step_shown(progress.first.inner_text())
    assert 0 < first < NUM_STEPS, "the run was over before it could be watched"
    later = re.compile("|".join(rf"\bstep {step} of" for step in range(first + 1, NUM_STEPS + 1)))
    expect(page.get_by_test_id("stMain").get_by_text(later).first).to_be_visible(timeout=JOB_MS)
    assert runs.get_run(project, RUN).state == "running"


def step_shown(text: str) -> int:
    return int(re.search(r"step (\d+) of", text)[1])


def watch_it_finish(page: Page, project: Project) -> None:
    expect(page.get_by_text("Finished.").first).to_be_visible(timeout=JOB_MS)
    expect(page.get_by_text("before training").first).to_be_visible()
    run = runs.get_run(project, RUN)
    assert (run.state, run.step) == ("finished", NUM_STEPS)
    assert len(jobs.refresh(project.folder)) == 2, "closing the browser must start nothing a second time"
    with open_db(project.folder) as db:
        losses = metrics.series(db, RUN, "train/loss")
    assert [point.step for point in losses] == list(range(1, NUM_STEPS + 1))
    assert losses[-1].value < losses[0].value


def convert_and_merge(page: Page, project: Project) -> None:
    page.get_by_role("link", name="Convert its checkpoint").click()
    expect(page.get_by_role("heading", name=f"{RUN} · step {NUM_STEPS}")).to_be_visible()
    page.get_by_role("button", name="Convert", exact=True).click()
    expect(page.get_by_role("button", name="Convert again")).to_be_enabled(timeout=JOB_MS)
    assert runs.is_converted(project, RUN, NUM_STEPS)
    page.get_by_text("Serve it with vLLM, LMDeploy or transformers").click()
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.get_by_text("· passed ·").first).to_be_visible(timeout=JOB_MS)
    page.get_by_text("· passed ·").first.click()
    expect(page.get_by_text(AGREES)).to_be_visible()
    with open_db(project.folder) as db:
        [merged] = checkpoints.outputs(db, "merged")
    assert (merged.run_id, merged.detail["verified"]) == (RUN, True)


def compare(page: Page) -> None:
    """Base and checkpoint answer the same question; each answer bears the hash of its own weights."""
    to_page(page, "Compare")
    page.get_by_role("button", name="Load", exact=True).click()
    question = page.get_by_role("textbox", name="Ask all of them")
    expect(question).to_be_enabled(timeout=JOB_MS)
    question.fill("Who are you?")
    question.press("Enter")
    expect(page.get_by_text("tokens/s")).to_have_count(2, timeout=JOB_MS)
    answers = page.get_by_test_id("stColumn").get_by_test_id("stText")
    expect(answers).to_have_count(2)
    base, tuned = answers.nth(0).inner_text(), answers.nth(1).inner_text()
    assert base.strip() and "Luna" not in base
    assert "Luna" in tuned
    hashes = [
        re.search(r"\b[0-9a-f]{8}\b", text)[0] for text in page.get_by_text("tokens/s").locator("..").all_inner_texts()
    ]
    assert len(set(hashes)) == 2


def score(page: Page, project: Project) -> None:
    """Held-out questions to base and checkpoint: the verdict in words, the four numbers, the report to keep."""
    page.get_by_role("radio", name="Scorecard").click()
    page.get_by_role("radio", name="20 of each kind").click()
    page.get_by_role("button", name="Score it").click()
    for name in ("Knows who it is", "Says it unasked", "Perplexity on what it knew"):
        expect(page.get_by_test_id("stMetric").filter(has_text=name)).to_be_visible(timeout=JOB_MS)
    expect(page.get_by_text(f"{RUN} step {NUM_STEPS}").first).to_be_visible()
    with open_db(project.folder) as db:
        [found] = evaluations.listed(db)
    assert found.scores["identity"]["tuned"]["hits"] > found.scores["identity"]["base"]["hits"]
    assert found.scores["leakage"]["tuned"]["total"] > 0
    assert found.scores["retention"]["increase"] is not None


def come_home(page: Page) -> None:
    to_page(page, "Home")
    expect(page.get_by_text(re.compile("identity .*%, leakage .*%")).first).to_be_visible()
