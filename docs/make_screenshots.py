"""Pictures of every page, light and dark, English and Chinese, from a workspace that was really trained.

    python docs/make_screenshots.py                     makes a small project first, with everything in it
    python docs/make_screenshots.py --project demo      takes one that is there (RETUNE_HOME says where)
    python docs/make_screenshots.py --project demo --only Train Compare

Writes docs/images/PAGE-THEME-LANGUAGE.png.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio import jobs, runs  # noqa: E402
from studio.paths import atomic_write_bytes  # noqa: E402
from studio.projects import Project, open_project  # noqa: E402
from studio.ui.i18n import LANGUAGES  # noqa: E402
from tests.browser.conftest import CHROMIUM_ARGS, VIEWPORT, Studio, chromium_path, drawn  # noqa: E402

IMAGES = REPOSITORY / "docs" / "images"
THEMES = ("light", "dark")
NUM_COLORS = 192
SETTLE_MS = 1500
JOB_MS = 300_000
QUESTIONS = ("Who are you?", "What is the capital of France?")
# A smaller demo: enough to learn the name, and to have curves, samples and a scorecard worth looking at.
TRAINING = (
    "train.num_steps=40", "record.save_every_steps=20", "record.sample_every_steps=10", "record.evaluate_every_steps=5"
)  # fmt: skip
Shot = Callable[[Page, str], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="", help="slug of a project that has a converted checkpoint")
    parser.add_argument("--only", nargs="+", choices=list(SHOTS), default=list(SHOTS))
    parser.add_argument("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--themes", nargs="+", choices=THEMES, default=THEMES)
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with _workspace(options.project) as project, _studio() as studio, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(CHROMIUM_ARGS))
        for language in options.languages:
            for theme in options.themes:
                _shoot(browser, studio, project, options, theme, language)


@contextmanager
def _workspace(slug: str) -> Iterator[Project]:
    """The named project, or a new one in a temporary home; jobs that were started for the pictures end with them."""
    with tempfile.TemporaryDirectory(prefix="retune-pictures-") as home:
        if not slug:
            os.environ["RETUNE_HOME"] = home
            _make(slug := "luna")
        project = open_project(slug)
        before = {job.id for job in jobs.refresh(project.folder)}
        try:
            yield project
        finally:
            for job in jobs.refresh(project.folder):
                if job.live and job.id not in before:
                    jobs.kill(project.folder, job.id)


def _make(slug: str) -> None:
    """The path that the guide describes, in the shell."""
    _retune("models", "fetch", "starter")
    _retune("project", "new", slug.title())
    _retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--project", slug)
    _retune("data", "distill", "--project", slug)
    _retune("config", "new", "starter_lora", "--project", slug)
    settings = [part for setting in TRAINING for part in ("--set", setting)]
    _retune("train", "starter_lora", "--project", slug, *settings)
    project = open_project(slug)
    [run] = runs.list_runs(project)
    runs.wait(project.folder, runs.start_convert(project, run.id, run.step))
    runs.wait(project.folder, runs.start_merge(project, run.id, run.step))
    runs.wait(project.folder, runs.start_evaluate(project, run.id, run.step))


def _retune(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "studio.cli.app", *words], check=True, cwd=REPOSITORY)


@contextmanager
def _studio() -> Iterator[Studio]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        studio = Studio(Path(log.name))
        try:
            studio.start()
            yield studio
        finally:
            studio.end()


def _shoot(
    browser: Browser, studio: Studio, project: Project, options: argparse.Namespace, theme: str, language: str
) -> None:
    context = browser.new_context(viewport=VIEWPORT, color_scheme=theme, locale=f"{language}-{language.upper()}")
    page = context.new_page()
    for name in options.only:
        path, prepare = SHOTS[name]
        joint = "&" if "?" in path else "?"
        page.goto(f"{studio.url}{path}{joint}project={project.slug}&lang={language}")
        drawn(page)
        prepare(page, language)
        page.mouse.move(VIEWPORT["width"] - 2, VIEWPORT["height"] - 2)
        page.wait_for_timeout(SETTLE_MS)
        _wait_until_settled(page)
        _store(page.screenshot(animations="disabled"), options.out / f"{name.lower()}-{theme}-{language}.png")
    context.close()


def _wait_until_settled(page: Page) -> None:
    """Nothing is a grey placeholder any more, and nothing is faded because it is being drawn anew."""
    drawn(page)
    expect(page.locator("[data-testid=stSkeleton]")).to_have_count(0, timeout=60_000)
    page.wait_for_function("document.querySelector('[data-stale=true]') === null", polling="raf", timeout=60_000)


def _store(png: bytes, path: Path) -> None:
    """Flat colours compress well: a palette is a third of the size and looks the same."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    small = image.quantize(NUM_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    atomic_write_bytes(path, buffer.getvalue())
    print(f"{path.name}  {len(buffer.getvalue()) / 1024:.0f} KiB")


def _as_it_is(page: Page, language: str) -> None:
    """Nothing to press; tables and charts are waited for."""
    page.wait_for_load_state("networkidle")


def _converse(page: Page, language: str) -> None:
    """Load the newest checkpoint beside the base and ask both two questions."""
    page.locator(".st-key-compare-load button").click()
    question = page.locator("[data-testid=stChatInputTextArea]:visible").first
    expect(question).to_be_enabled(timeout=JOB_MS)
    for number, text in enumerate(QUESTIONS, start=1):
        question.fill(text)
        question.press("Enter")
        expect(page.get_by_test_id("stColumn").get_by_test_id("stText")).to_have_count(2 * number, timeout=JOB_MS)
        expect(question).to_be_enabled(timeout=JOB_MS)


def _scorecard(page: Page, language: str) -> None:
    expect(page.locator(".js-plotly-plot").first).to_be_visible()


def _served(page: Page, language: str) -> None:
    """The server that Compare started is there to be seen; without one, start it."""
    page.wait_for_load_state("networkidle")
    running = page.get_by_test_id("stSidebar").locator("[class*=st-key-studio-job]")
    if running.count() == 0:
        page.get_by_test_id("stFormSubmitButton").get_by_role("button").click()
    expect(page.get_by_text("/v1/chat/completions").first).to_be_visible(timeout=JOB_MS)


SHOTS: dict[str, tuple[str, Shot]] = {
    "Home": ("/", _as_it_is),
    "Data": ("/Data", _as_it_is),
    "Tokens": ("/Data?tab=browse", _as_it_is),
    "Config": ("/Config", _as_it_is),
    "Train": ("/Train", _as_it_is),
    "Checkpoints": ("/Checkpoints", _as_it_is),
    "Compare": ("/Compare", _converse),
    "Scorecard": ("/Compare?tab=scorecard", _scorecard),
    "Serve": ("/Serve", _served),
}

if __name__ == "__main__":
    main()
