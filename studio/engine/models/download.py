"""One file over HTTP that survives a kill: a `.part` resumed with Range, accepted only with the right hash."""

import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from studio.errors import ModelError
from studio.paths import require_free_space, sha256_of

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in total, and what is being done; may raise to stop the work."""

NUM_ATTEMPTS = 5
"""Failures in a row, none of which brought a single byte, before the download gives up."""
FIRST_WAIT_SECONDS = 0.5


def http_client() -> httpx.Client:
    """A client that follows redirects and trusts the certificates that pip or requests were told to trust."""
    bundle = next((os.environ[name] for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE") if os.environ.get(name)), None)
    verify = ssl.create_default_context(cafile=bundle) if bundle else True
    timeout = httpx.Timeout(30.0, connect=15.0)
    return httpx.Client(follow_redirects=True, timeout=timeout, verify=verify)


def without_secrets(url: str) -> str:
    """The URL without user, password and query, fit for a message."""
    parsed = httpx.URL(url)
    return str(parsed.copy_with(username=None, password=None, query=None, fragment=None))


def download(
    client: httpx.Client, url: str, part: Path, size_bytes: int, sha256: str, progress: Progress, what: str
) -> None:
    """Bring `part` to `size_bytes` bytes with the given hash; a broken transfer goes on where it stopped.

    Raises ModelError when the server keeps failing or the content is not what was expected (then `part` is deleted).
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(part.parent, size_bytes - _size(part), what)
    num_failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(client, url, part, size_bytes, progress, what)
            break
        except httpx.TransportError as error:
            num_failures = num_failures + 1 if _size(part) <= before else 1
            _give_up_or_wait(error, num_failures, url)
    _accept(part, size_bytes, sha256, url)


def _transfer(client: httpx.Client, url: str, part: Path, size_bytes: int, progress: Progress, what: str) -> None:
    done = _size(part)
    if done >= size_bytes:
        progress(size_bytes, size_bytes, what)
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with client.stream("GET", url, headers=headers) as response:
        _require_success(response, url)
        if done and not _continues(response, done):
            done = 0
        with open(part, "r+b" if done else "wb") as file:
            file.seek(done)
            for piece in response.iter_raw():
                done += len(piece)
                if done > size_bytes:
                    part.unlink()
                    raise ModelError(f"{without_secrets(url)} is longer than the {size_bytes} bytes expected.")
                file.write(piece)
                progress(done, size_bytes, what)


def _require_success(response: httpx.Response, url: str) -> None:
    if response.status_code >= 500:
        raise httpx.RemoteProtocolError(f"status {response.status_code}")
    if response.status_code >= 400:
        raise ModelError(f"{without_secrets(url)} answered with status {response.status_code}.")


def _continues(response: httpx.Response, start: int) -> bool:
    """A server may ignore Range and send everything (status 200), or send another piece than the one asked for."""
    return response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _give_up_or_wait(error: httpx.TransportError, num_failures: int, url: str) -> None:
    if num_failures == NUM_ATTEMPTS:
        raise ModelError(
            f"The download of {without_secrets(url)} failed {NUM_ATTEMPTS} times, last with: {error}.",
            "Check the network and try again; what has arrived is kept.",
        ) from error
    time.sleep(FIRST_WAIT_SECONDS * 2 ** (num_failures - 1))


def _accept(part: Path, size_bytes: int, sha256: str, url: str) -> None:
    actual = _size(part)
    if actual < size_bytes:
        raise ModelError(
            f"{without_secrets(url)} ended after {actual} of {size_bytes} bytes.",
            "Try again; what has arrived is kept.",
        )
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise ModelError(
            f"{without_secrets(url)} is not the file expected: its sha256 is {found}, not {sha256}. It was deleted.",
            "Try again; if it happens again, a proxy or mirror is changing the file.",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
