"""Sixty hostile texts in every place where a text of somebody else's is shown: they stay text, letter by letter."""

import subprocess
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from studio import chat_export, comparison, report, run_report, runs
from studio.errors import ProjectError
from studio.projects import Project, create_project
from studio.store import evaluations, open_db, run_events
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from tests.browser import workspace
from tests.browser.conftest import Visitor, drawn, to_page
from tests.hostile_texts import HALF_TAGS, NEVER, SCRIPTS, TEXTS
from tests.pages.model_server import ModelServer

pytestmark = pytest.mark.browser

PAGES = ("Config", "Checkpoints", "Serve")  # the others are looked at closely
BROKEN = "broken-1"
DRAWN_SECONDS = 40
FAILED = TEXTS[:2]  # what a comparison shows are the questions that failed


@pytest.fixture
def speaking() -> Iterator[ModelServer]:
    """A model server whose every word is hostile, and comes in two halves."""
    server = ModelServer(["starter"], word_seconds=0.01)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :] + "\n") for text in TEXTS]
    server.words = [half for both in halves for half in both] + list(HALF_TAGS)
    yield server
    server.close()


def test_hostile_texts_are_text_on_every_page(
    visitor: Visitor, speaking: ModelServer, owner: subprocess.Popen[bytes]
) -> None:
    named = [project for text in TEXTS[::8] if (project := named_after(text))]  # each is a card on Home
    project = named[0]
    workspace.fill(project, *TEXTS)
    break_a_run(project)
    workspace.serve(project, speaking, owner)

    page = visitor.open(f"/?project={project.slug}")
    shows(page, *(each.name for each in named))
    for label in PAGES:
        to_page(page, label)
        page.wait_for_timeout(500)
        harmless(page)
    browse(page)
    train(page)
    ask(page)
    shows(page, *TEXTS, *HALF_TAGS)
    look_back(page)
    for tab in ("Scorecard", "Runs"):
        page.get_by_role("radio", name=tab).click()
        page.wait_for_timeout(500)
        harmless(page)
    ask_with_tools(page)
    page.goto(f"{visitor.studio.url}/Train?project={SCRIPTS[3]}&run={SCRIPTS[0]}")
    drawn(page)
    harmless(page)


def named_after(text: str) -> Project | None:
    """A project of that name; None for a text of which no name is left."""
    try:
        return create_project(text)
    except ProjectError:
        return None


def break_a_run(project: Project) -> None:
    """A run whose job, cause and events say what a hostile file might have made an error say."""
    cause = "The file cannot be read: " + " ".join(TEXTS[:30])
    folder = runs.run_folder(project, BROKEN)
    folder.mkdir(parents=True)
    (folder / runs.LOG_FILE).write_text("\n".join(TEXTS))
    job = store_jobs.Job(kind="train", title=SCRIPTS[0], run_id=BROKEN, log_path=str(folder / runs.LOG_FILE))
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
        store_jobs.move(db, job.id, "failed", cause)
        detail = {"started_despite": list(TEXTS[:5])}
        store_runs.add(db, store_runs.Run(BROKEN, "broken", SCRIPTS[1], "lora", job.id, detail=detail))
        for number, text in enumerate(TEXTS):
            run_events.add(db, run_events.RunEvent(BROKEN, number, "bad_step", {"reason": text}))


def browse(page: Page) -> None:
    to_page(page, "Data")
    page.get_by_role("radio", name="Browse and edit").click()
    page.get_by_role("radio", name="general").click()
    drawn(page)
    shows(page, TEXTS[0])


def train(page: Page) -> None:
    """All that is said of a run that failed, and the samples and the log of one that went well."""
    to_page(page, "Train")
    page.get_by_test_id("stMain").get_by_role("radio", name=BROKEN).check(force=True)
    expect(page.get_by_role("heading", name=BROKEN)).to_be_visible()
    shows(page, "The file cannot be read", *TEXTS[:30])
    page.get_by_test_id("stMain").get_by_role("radio", name=workspace.RUN).check(force=True)
    expect(page.get_by_role("heading", name=workspace.RUN)).to_be_visible()
    shows(page, *TEXTS)


def ask(page: Page) -> None:
    """What is asked is hostile too; half-written tags are looked at while they stream."""
    to_page(page, "Compare")
    page.get_by_role("button", name="Load", exact=True).click()
    question = page.get_by_role("textbox", name="Ask all of them")
    expect(question).to_be_enabled()
    question.fill(" ".join(TEXTS[:40]))
    question.press("Enter")
    for _ in range(5):
        page.wait_for_timeout(200)
        assert made_of_texts(page) == []
    expect(page.get_by_text("tokens/s")).to_have_count(2)


def ask_with_tools(page: Page) -> None:
    page.get_by_role("radio", name="With tools").click()
    question = page.get_by_role("textbox", name="Ask with tools")
    question.fill(SCRIPTS[5])
    question.press("Enter")
    shows(page, SCRIPTS[5], *TEXTS)


def look_back(page: Page) -> None:
    """The kept conversation: in the list of all, searched for, and read again."""
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("textbox", name="Search").fill(SCRIPTS[0])
    page.get_by_role("textbox", name="Search").press("Enter")
    found = page.get_by_test_id("stPopoverBody").get_by_role("button")
    expect(found).to_have_count(1)
    harmless(page)
    found.press("Enter")  # a page that scrolls to the newest turn meanwhile takes the list out of a mouse's reach
    drawn(page)
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("stPopoverBody")).to_have_count(0)
    shows(page, *TEXTS)


def shows(page: Page, *texts: str) -> None:
    """Each text stands on the page letter by letter before long, and nothing came of it."""
    deadline = time.monotonic() + DRAWN_SECONDS
    while missing := unseen(page, texts):
        assert time.monotonic() < deadline, f"not on the page: {missing[:3]} and {len(missing[3:])} more"
        page.wait_for_timeout(200)
    harmless(page)


def unseen(page: Page, texts: Sequence[str]) -> list[str]:
    seen = letters(page.evaluate("document.body.innerText"))
    return [text for text in texts if letters(text) not in seen]


def letters(text: str) -> str:
    """What can be seen of a text: without spaces, and without what has no shape of its own."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c)[0] != "C" and c not in "\ufffd")


def harmless(page: Page) -> None:
    drawn(page)
    assert made_of_texts(page) == []
    assert page.evaluate("window.hit") is None


def made_of_texts(page: Page) -> list[str]:
    """Elements that can only have come from one of the texts."""
    return page.eval_on_selector_all(NEVER, "found => found.map(each => each.outerHTML.slice(0, 300))")


def test_reports_opened_from_a_file_stay_text(chromium: Browser, own_home: Path, tmp_path: Path) -> None:
    """With the scripts of the reader's browser on, and no server that might forbid anything."""
    project = create_project("Luna")
    workspace.fill(project, *TEXTS)
    with open_db(project.folder) as db:
        [card] = evaluations.listed(db)
        answers = evaluations.answers(db, card.id)
    card.subject = SCRIPTS[2]
    found = comparison.compare(project, [workspace.RUN])
    pages = {
        "scorecard": report.as_html(card, answers),
        "runs": run_report.as_html(found, SCRIPTS[1], SCRIPTS[4]),
        "chat": chat_export.exported(project, workspace.converse(project, *TEXTS).id, "html"),
    }
    context = chromium.new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    for name, content in pages.items():
        file = tmp_path / f"{name}.html"
        file.write_text(content, encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit") is None and made_of_texts(page) == []
        assert unseen(page, FAILED if name == "runs" else TEXTS) == []
    assert asked == [(tmp_path / f"{name}.html").as_uri() for name in pages]
    context.close()
