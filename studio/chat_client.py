"""Talks to the model server: wait until it is ready, list its models, ask one, or several side by side."""

import json
import socket
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from studio import jobs
from studio.errors import ChatTooLongError, ServerError
from studio.store.jobs import Job

CONNECTION_FILE = "connection.json"
POLL_SECONDS = 0.2
TOO_LONG = "context_length_exceeded"  # OpenAI's code for it
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
    """How to answer; temperature 0 takes the most likely token. Equal seeds give equal noise in every column.

    `top_k` 0 keeps all tokens, `repetition_penalty` 1 penalises none, `stop` texts end an answer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One side of a comparison: a model's name on the server ("base", or what `list_models` gives) and the chat that it
    continues; when the last message is the assistant's, the answer goes on from there.

    `sampling`: its own way to answer and its own seed, that of all columns when None. All columns are decoded in one
    batch whatever they ask: up to 8 of them, of the base, adapters and full models.
    """

    model: str
    messages: Messages
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Event:
    """News from one column. The first names the weights, with a `proof` of what makes the answer (base, adapter on or
    off, template, sampling, by hashes); later ones bring text, the last has a `finish_reason` ("stop", "length",
    "cancelled" or "error", then with `error`), `num_tokens` and `num_prompt_tokens`, and `seconds` until then and
    `first_token_seconds` until the first text, both from the moment it was asked."""

    column: int
    delta: str = ""
    weights: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    error: str = ""
    proof: dict[str, Any] = field(default_factory=dict)
    num_prompt_tokens: int = 0


class Line:
    """The connection of a request, or of several after each other, to be cut by another thread: also while the server
    has nothing to say."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._is_cut = False

    def cut(self) -> None:
        """End the request now, or as soon as it is connected; whoever waits for it gets a ServerError."""
        self._is_cut = True
        self._shut()

    def mend(self) -> None:
        """Let requests through again after a cut."""
        self._is_cut, self._socket = False, None

    def trace(self, name: str, info: Mapping[str, Any]) -> None:
        """What httpx tells of a request on its way (https://www.python-httpx.org/advanced/extensions/#trace)."""
        if name == "connection.connect_tcp.complete":
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_cut:
                self._shut()

    def _shut(self) -> None:
        # Unlike closing, this wakes a thread that reads. Whose socket has gone already has nothing to wake.
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Served:
    """A model of a server. `kind`: base, adapter, or model (one with weights of its own)."""

    name: str
    kind: str
    weights: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """A running server. `loaded`: whether its weights are in memory; `num_asked`: answers since it was started."""

    loaded: bool
    num_answering: int
    num_waiting: int
    max_answering: int
    max_waiting: int
    num_asked: int
    memory_bytes: int
    keeps_words: bool = False
    models: list[Served] = field(default_factory=list)


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


def list_warnings(connection: Connection) -> list[str]:
    """Why the answers of what is loaded may be worse than they should be; empty when nothing speaks for it."""
    with _client(connection) as client:
        models = _checked(client.get("/v1/models")).json()["data"]
    return [warning for model in models for warning in model.get("warnings", [])]


def stream_chat(
    connection: Connection, model: str, messages: Messages, sampling: Sampling, line: Line | None = None
) -> Generator[str, None, None]:
    """Pieces of one model's answer; closing the iterator stops it, and so does cutting the `line`. Raises ServerError
    when it breaks off."""
    with closing(stream_compare(connection, [Column(model, messages)], sampling, line)) as events:
        for event in events:
            if event.error:
                raise ServerError(f"The answer broke off: {event.error}")
            yield event.delta


def stream_compare(
    connection: Connection, columns: Sequence[Column], sampling: Sampling, line: Line | None = None
) -> Iterator[Event]:
    """Ask all columns at once and yield events as they come. Closing the iterator stops the answers; so does cutting
    the `line`, whatever is waited for. Raises ServerError."""
    body = {
        "columns": [_column(column) for column in columns],
        "sampling": asdict(sampling),
    }
    traced = {"trace": line.trace} if line else {}
    with (
        _client(connection) as client,
        client.stream("POST", "/studio/compare", json=body, extensions=traced) as response,
    ):
        if response.is_error:
            response.read()
        for text in _checked(response).iter_lines():
            if text.startswith("data: ") and text != "data: [DONE]":
                yield Event(**json.loads(text.removeprefix("data: ")))


def rendered_prompt(connection: Connection, model: str, messages: Messages) -> dict[str, Any]:
    """What a model would read: `text`, `num_prompt_tokens`, and the hashes `template` and `prompt_sha256`."""
    with _client(connection) as client:
        return dict(_checked(client.post("/studio/prompt", json=_column(Column(model, messages)))).json())


def self_test(connection: Connection) -> dict[str, Any]:
    """Whether the base's logits, with every adapter off, are those that it had before any adapter was loaded.

    `off` and `beside` (adapter: ...) hold `bit_equal` and `max_difference` of the logits, `on` (adapter: ...) how far
    each adapter moves them.
    """
    with _client(connection) as client:
        return dict(_checked(client.post("/studio/selftest")).json())


def add_adapter(connection: Connection, name: str, path: str | Path) -> str:
    """Load a folder of weights, inside the project, into a running server; returns the weights' hash."""
    with _client(connection) as client:
        response = _checked(client.post("/studio/adapters", json={"name": name, "path": str(path)}))
    return str(response.json()["weights"])


def remove_adapter(connection: Connection, name: str) -> None:
    """Take an adapter or a full model out of a running server; what it answers just now ends with an error."""
    with _client(connection) as client:
        _checked(client.delete(f"/studio/adapters/{name}"))


def status(connection: Connection) -> Status:
    """What is loaded and how much there is to do; the server does not count it as being asked."""
    with _client(connection) as client:
        values = _checked(client.get("/studio/status")).json()
        models = _checked(client.get("/v1/models")).json()["data"]
    served = [Served(each["id"], each["kind"], each["weights"], tuple(each["warnings"])) for each in models]
    known = {name: values[name] for name in Status.__dataclass_fields__ if name in values}
    return Status(**{**known, "models": served})


def unload(connection: Connection) -> bool:
    """Let a server go of its weights until somebody asks again; False when it is answering just now."""
    with _client(connection) as client:
        return bool(_checked(client.post("/studio/unload")).json()["unloaded"])


@contextmanager
def _client(connection: Connection) -> Iterator[httpx.Client]:
    """Errors of the wire become ServerError. Proxies are left out: the server is on this machine."""
    headers = {"Authorization": f"Bearer {connection.token}", "User-Agent": "retune"}
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


def _column(column: Column) -> dict[str, Any]:
    messages = [dict(message) for message in column.messages]
    goes_on = {"continue_final_message": True} if messages and messages[-1]["role"] == "assistant" else {}
    own = {"sampling": asdict(column.sampling)} if column.sampling else {}
    return {"model": column.model, "messages": messages, **goes_on, **own}


def _checked(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    if response.status_code == 401:
        raise ServerError("The model server refused the token.", "Another server took its place: connect again.")
    message, code = _error_of(response)
    kind = ChatTooLongError if code == TOO_LONG else ServerError
    raise kind(message, "Correct the request and ask again.")


def _error_of(response: httpx.Response) -> tuple[str, str]:
    """(message, code) of an answer in OpenAI's form of an error."""
    try:
        error: Any = response.json()["error"]
        return str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"The model server answered {response.status_code}.", ""
