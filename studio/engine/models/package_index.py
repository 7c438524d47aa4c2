"""Finds the address of one file of one release in the package index that pip is set up to use."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin

import httpx

from studio.engine.models.download import without_secrets
from studio.errors import ModelError

INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


def index_url() -> str:
    """The simple index: from the environment, else pip's configuration, else pip's own default."""
    chosen = next((os.environ[name] for name in INDEX_VARIABLES if os.environ.get(name)), None)
    return chosen or _configured_index() or _default_index()


def find_file(client: httpx.Client, project: str, filename: str) -> str:
    """The URL of `filename` on the project's page. Raises ModelError when the index has no such page or file."""
    page = f"{index_url().rstrip('/')}/{project}/"
    response = client.get(page, headers={"Accept": ACCEPT})
    if response.status_code != 200:
        raise ModelError(f"The package index page {without_secrets(page)} answered with {response.status_code}.")
    links = _links(response)
    if filename not in links:
        raise ModelError(f"The package index page {without_secrets(page)} does not list {filename}.")
    return urldefrag(urljoin(str(response.url), links[filename])).url


def _configured_index() -> str | None:
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return found.stdout.strip() or None


def _default_index() -> str:
    try:
        from pip._internal.models.index import PyPI
    except ImportError as error:
        raise ModelError(
            "No package index is known: pip is not installed here.", "Set PIP_INDEX_URL to a simple index."
        ) from error
    return PyPI.simple_url


def _links(response: httpx.Response) -> dict[str, str]:
    if "json" in response.headers.get("Content-Type", ""):
        return {file["filename"]: file["url"] for file in response.json()["files"]}
    collector = _AnchorCollector()
    collector.feed(response.text)
    return collector.links


class _AnchorCollector(HTMLParser):
    """Collects the text and the address of every link of a simple index page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self._address: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self._address = dict(attrs).get("href")

    def handle_data(self, data: str) -> None:
        if self._address:
            self.links[data.strip()] = self._address

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._address = None
