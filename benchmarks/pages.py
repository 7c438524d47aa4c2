"""How long a person waits for a page: first paint after the server's start, and switching pages, in real Chromium.

    python benchmarks/pages.py [--repeats 5]

Fills a project of a temporary RETUNE_HOME (240 identity rows, a finished run, a checkpoint, a scorecard). For first
paint, each measurement starts a new page server and a new browser profile with an empty cache, waits until the server
says that it is healthy, and opens one page. For switching, a link of the sidebar is clicked in one window. Times end
when the page's heading is drawn (paint) and when its script has run through (complete). Writes
benchmarks/results/pages.md.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio.paths import atomic_write_text  # noqa: E402
from studio.projects import create_project  # noqa: E402
from tests.browser import workspace  # noqa: E402
from tests.browser.conftest import CHROMIUM_ARGS, VIEWPORT, Studio, chromium_path  # noqa: E402

RESULT = Path(__file__).parent / "results" / "pages.md"
PAGES = {
    "Home": "/", "Data": "/Data", "Config": "/Config", "Train": "/Train", "Checkpoints": "/Checkpoints",
    "Compare": "/Compare", "Serve": "/Serve",
}  # fmt: skip
PAINT_TARGET_SECONDS, SWITCH_TARGET_SECONDS = 2.0, 1.0
PAINTED = """label => {
  const heading = document.querySelector("[data-testid=stMainBlockContainer] h1");
  return heading !== null && heading.innerText.includes(label);
}"""
COMPLETE = """() => document.querySelector("[data-testid=stApp]").dataset.testScriptState === "notRunning"
  && document.querySelector("[data-testid=stMainBlockContainer] [data-testid=stSkeleton]") === null"""
Times = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as home, sync_playwright() as playwright:
        os.environ["RETUNE_HOME"] = home
        project = create_project("Luna")
        workspace.fill(project)
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(CHROMIUM_ARGS))
        log = Path(home) / "streamlit.log"
        paints = {
            label: [_first_paint(browser, log, path, label) for _ in range(options.repeats)]
            for label, path in PAGES.items()
        }
        switches = _switches(browser, log, options.repeats)
        page = _report(paints, switches, _machine(browser.version, load_before))
    RESULT.parent.mkdir(exist_ok=True)
    atomic_write_text(RESULT, page)
    print(page)


@contextmanager
def _server(log: Path) -> Iterator[Studio]:
    studio = Studio(log)
    try:
        studio.start()
        yield studio
    finally:
        studio.end()


def _first_paint(browser: Browser, log: Path, path: str, label: str) -> Times:
    with _server(log) as studio:
        context = browser.new_context(viewport=VIEWPORT, locale="en-US")
        page = context.new_page()
        began = time.perf_counter()
        page.goto(studio.url + path, wait_until="commit")
        times = _wait(page, label, began)
        context.close()
    print(f"first paint {label}: {times[0]:.2f} s, complete {times[1]:.2f} s", file=sys.stderr)
    return times


def _switches(browser: Browser, log: Path, repeats: int) -> dict[str, list[Times]]:
    """Round after round through all pages in one window; the first round, the first visits, counts too."""
    found: dict[str, list[Times]] = {label: [] for label in PAGES}
    with _server(log) as studio:
        page = browser.new_context(viewport=VIEWPORT, locale="en-US").new_page()
        page.goto(studio.url)
        _wait(page, "Home", time.perf_counter())
        for _round in range(repeats):
            for label in [*list(PAGES)[1:], "Home"]:
                found[label].append(_switch(page, label))
        page.context.close()
    return found


def _switch(page: Page, label: str) -> Times:
    page.wait_for_timeout(500)
    began = time.perf_counter()
    page.get_by_test_id("stSidebar").get_by_role("link", name=label).click()
    times = _wait(page, label, began)
    print(f"switch to {label}: {times[0]:.2f} s, complete {times[1]:.2f} s", file=sys.stderr)
    return times


def _wait(page: Page, label: str, began: float) -> Times:
    page.wait_for_function(PAINTED, arg=label, polling="raf", timeout=60_000)
    painted = time.perf_counter() - began
    page.wait_for_function(COMPLETE, polling="raf", timeout=60_000)
    return painted, time.perf_counter() - began


def _report(paints: dict[str, list[Times]], switches: dict[str, list[Times]], machine: str) -> str:
    return "\n".join(
        [
            "# First paint and switching pages",
            "",
            "`python benchmarks/pages.py`: seconds until the heading of a page is drawn (paint) and until its",
            "script has run through (complete). First paint: a new page server and an empty browser cache every time.",
            "",
            f"Machine: {machine}",
            "",
            *_table("First paint after the server's start", paints, PAINT_TARGET_SECONDS),
            "",
            *_table("Switching to a page", switches, SWITCH_TARGET_SECONDS),
            "",
        ]
    )


def _table(title: str, found: dict[str, list[Times]], target: float) -> list[str]:
    lines = [
        f"## {title}",
        "",
        f"Target: paint under {target:.0f} s.",
        "",
        "| page | paint, median | paint, slowest | complete, median | complete, slowest | measurements | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, times in found.items():
        paint, complete = zip(*times, strict=True)
        numbers = [median(paint), max(paint), median(complete), max(complete)]
        cells = [label, *(f"{value:.2f}" for value in numbers), str(len(times))]
        lines.append(f"| {' | '.join(cells)} | {'met' if max(paint) < target else 'missed'} |")
    return lines


def _machine(version: str, load_before: float) -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    memory = psutil.virtual_memory().total / 2**30
    load_after = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory; Python {platform.python_version()}, "
        f"Chromium {version}. Load average {load_before:.1f} before and {load_after:.1f} after: "
        "what is above 1 or 2 is other work, and slows the pages down."
    )


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
