"""A studio of its own on a free port, and a real Chromium that notes everything a page should not do."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Response,
    expect,
    sync_playwright,
)

from studio import jobs
from studio.paths import REPOSITORY

START_SECONDS = 60
CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
FAILED_LOAD = "Failed to load resource"
# Opened at /Train, Streamlit's own script tries that as the address of its server before it tries /.
BASE_SEARCH = re.compile(r"/\w+/_stcore/(health|host-config)")
VIEWPORT = {"width": 1400, "height": 900}
expect.set_options(timeout=40_000)  # a busy machine; only what fails waits so long


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Studio:
    """`streamlit run app.py` as a person starts it, at home in the test's RETUNE_HOME."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        threads = str(min(2, os.cpu_count() or 1))
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(self.port)],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": "0"},
            )
        self._wait_until_healthy()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the page server ended:\n{self.log.read_text()}"
            try:
                with urlopen(f"{self.url}/_stcore/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"the page server was not ready in {START_SECONDS} s:\n{self.log.read_text()}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the page server alone; the jobs that it started are processes of their own."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Watch:
    """What pages in one browser context did that they should not: script errors, dialogs, requests that leave."""

    def __init__(self, context: BrowserContext) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.dialogs: list[str] = []
        context.on("page", self._on_page)
        context.on("request", lambda request: self._note(request.url))
        context.on("response", self._on_response)
        context.route(lambda url: not stays_here(url), lambda route: route.abort())

    def _on_page(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._on_console)
        page.on("websocket", lambda websocket: self._note(websocket.url))
        page.on("dialog", self._on_dialog)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(FAILED_LOAD):  # _on_response knows which
            self.errors.append(message.text)

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and not BASE_SEARCH.fullmatch(urlsplit(response.url).path):
            self.errors.append(f"{response.status} for {response.url}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _note(self, url: str) -> None:
        if not stays_here(url):
            self.foreign.append(url)

    def assert_clean(self) -> None:
        """No request left this machine, no script of a stranger ran, and the page's own scripts had no error."""
        assert not self.foreign, f"requests to other hosts: {self.foreign}"
        assert not self.dialogs, f"dialogs: {self.dialogs}"
        assert not self.errors, f"errors in the browser's console: {self.errors}"


def stays_here(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about") or parts.hostname == "127.0.0.1"


class Visitor:
    """Opens browser contexts on a studio; each has its own cookies and storage, as another person's browser would."""

    def __init__(self, browser: Browser, studio: Studio) -> None:
        self.browser = browser
        self.studio = studio
        self.watches: list[Watch] = []
        self.contexts: list[BrowserContext] = []

    def open(self, path: str = "/", **options: object) -> Page:
        """A new context with one page at `path`, drawn to its heading."""
        context = self.browser.new_context(**{"viewport": VIEWPORT, "locale": "en-US", **options})
        self.contexts.append(context)
        self.watches.append(Watch(context))
        page = context.new_page()
        page.goto(self.studio.url + path)
        drawn(page)
        return page

    def leave(self, page: Page) -> None:
        """Close the browser window and all that belongs to it."""
        self.contexts.remove(page.context)
        page.context.close()

    def assert_clean(self) -> None:
        for watch in self.watches:
            watch.assert_clean()


def drawn(page: Page) -> None:
    """Wait until the page's script has run through; fail when it raised."""
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.locator("[data-testid=stApp]")).to_have_attribute("data-test-script-state", "notRunning")
    expect(page.locator("[data-testid=stException]")).to_have_count(0)


def to_page(page: Page, label: str) -> None:
    """Click a link of the sidebar and wait for that page."""
    page.get_by_test_id("stSidebar").get_by_role("link", name=label).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(label)
    drawn(page)


def chromium_path() -> str:
    """The installed Chromium. Without one the test is skipped, or fails where CI promises one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
    if not Path(found).exists():
        message = "Chromium is not installed: `apt-get install chromium`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_ARGS))
        yield browser
        browser.close()


@pytest.fixture
def studio(own_home: Path, tmp_path: Path) -> Iterator[Studio]:
    """A running page server; it and every job that it started are gone afterwards."""
    server = Studio(tmp_path / "streamlit.log")
    try:
        server.start()
        yield server
    finally:
        server.end()
        for folder, job in jobs.live_jobs():
            jobs.kill(folder, job.id)


@pytest.fixture
def visitor(chromium: Browser, studio: Studio, request: pytest.FixtureRequest) -> Iterator[Visitor]:
    """Opens pages; afterwards nothing may have gone wrong in any of them. A failed test leaves pictures behind."""
    opened = Visitor(chromium, studio)
    yield opened
    if folder := os.environ.get("RETUNE_BROWSER_PICTURES"):
        _take_pictures(opened, Path(folder), request.node.name)
    for context in opened.contexts:
        context.close()
    opened.assert_clean()


def _take_pictures(visitor: Visitor, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, context in enumerate(visitor.contexts):
        for page in context.pages:
            page.screenshot(path=folder / f"{name}-{number}.png", full_page=True)


Wait = Callable[[Callable[[], bool], float, str], None]


@pytest.fixture
def wait_for() -> Wait:
    """Wait until a condition outside the browser holds."""

    def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.2)

    return wait


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process for rows of live jobs to name."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()
