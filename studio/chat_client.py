"""Talks to the model server: wait until it is ready, list its models, ask one, or several side by side."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from studio import jobs
from studio.errors import ServerError
from studio.store.jobs import Job

CONNECTION_FILE = "connection.json"
POLL_SECONDS = 0.2
# A long prompt on a slow machine may take a while to its first token.
TIMEOUT = httpx.Timeout(10.0, read=300.0)

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Connection:
    """Where a model server answers, and the token it wants."""

    url: str
    token: str

    def __repr__(self) -> str:  # a token must not reach a log
        return f"Connection(url={self.url!r})"


@dataclass(frozen=True)
class Sampling:
    """How to answer; temperature 0 takes the most likely token. Equal seeds give equal noise in every column."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Column:
    """One side of a comparison: a model's name on the server and the chat it continues."""

    model: str
    messages: Messages


@dataclass(frozen=True)
class Event:
    """News from one column. The first names the weights, later ones bring text, the last has a `finish_reason`
    ("stop", "length" or "error", then with `error`), `num_tokens` and `seconds`."""

    column: int
    delta: str = ""
    weights: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


def wait_until_ready(project_folder: Path, job: Job, timeout_seconds: float = 300.0) -> Connection:
    """Block until the server of a `serve` job answers. Raises ServerError when the job ends or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        now = jobs.get(project_folder, job.id)
        if not now.live:
            raise ServerError(
                f"The model server {now.state} before it was ready. {now.cause}".strip(), f"Its log: {now.log_path}"
            )
        if connection := read_connection(project_folder, job):
            return connection
        time.sleep(POLL_SECONDS)
    raise ServerError(f"The model server was not ready within {timeout_seconds:.0f} s.", f"Its log: {job.log_path}")


def read_connection(project_folder: Path, job: Job) -> Connection | None:
    """What the server wrote when it was ready; None before."""
    try:
        values = json.loads((project_folder / "jobs" / job.id / CONNECTION_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Connection(values["url"], values["token"])


def list_models(connection: Connection) -> list[str]:
    """Names that `model` may be, the base first."""
    with _client(connection) as client:
        return [model["id"] for model in _checked(client.get("/v1/models")).json()["data"]]


def chat(connection: Connection, model: str, messages: Messages, sampling: Sampling) -> str:
    """The whole answer of one model."""
    body = {"model": model, "messages": [dict(message) for message in messages], **asdict(sampling)}
    with _client(connection) as client:
        answer = _checked(client.post("/v1/chat/completions", json=body)).json()
    return str(answer["choices"][0]["message"]["content"])


def stream_compare(connection: Connection, columns: Sequence[Column], sampling: Sampling) -> Iterator[Event]:
    """Ask all columns at once and yield events as they come; closing the iterator stops the answers."""
    body = {
        "columns": [{"model": c.model, "messages": [dict(message) for message in c.messages]} for c in columns],
        "sampling": asdict(sampling),
    }
    with _client(connection) as client, client.stream("POST", "/studio/compare", json=body) as response:
        if response.is_error:
            response.read()
        for line in _checked(response).iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield Event(**json.loads(line.removeprefix("data: ")))


def add_adapter(connection: Connection, name: str, path: str | Path) -> str:
    """Load a folder of weights, inside the project, into a running server; returns the weights' hash."""
    with _client(connection) as client:
        response = _checked(client.post("/studio/adapters", json={"name": name, "path": str(path)}))
    return str(response.json()["weights"])


@contextmanager
def _client(connection: Connection) -> Iterator[httpx.Client]:
    """Errors of the wire become ServerError. Proxies are left out: the server is on this machine."""
    headers = {"Authorization": f"Bearer {connection.token}"}
    try:
        with httpx.Client(base_url=connection.url, headers=headers, timeout=TIMEOUT, trust_env=False) as client:
            yield client
    except httpx.TimeoutException as error:
        raise ServerError(
            f"The model server at {connection.url} took too long to answer.",
            "Ask for a shorter answer, or stop other work on this machine.",
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(
            f"The model server at {connection.url} does not answer ({type(error).__name__}).",
            "It may have stopped after being idle: start it again.",
        ) from error


def _checked(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    if response.status_code == 401:
        raise ServerError("The model server refused the token.", "Another server took its place: connect again.")
    raise ServerError(_error_message(response), "Correct the request and ask again.")


def _error_message(response: httpx.Response) -> str:
    try:
        error: Any = response.json()["error"]
        return str(error["message"])
    except (ValueError, KeyError, TypeError):
        return f"The model server answered {response.status_code}."
