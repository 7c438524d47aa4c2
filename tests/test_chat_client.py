"""The client against a small HTTP server of the test's own; the real server is asked in tests/engine/test_server.py."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from studio import chat_client, jobs
from studio.chat_client import Column, Connection, Event, Sampling
from studio.errors import ServerError
from studio.projects import Project
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store.jobs import Job


class Handler(BaseHTTPRequestHandler):
    """Answers what the test put into `answer`: (status, body)."""

    answer: tuple[int, str] = (200, "")
    seen: list[tuple[str, dict]] = []

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: dict) -> None:
        Handler.seen.append((self.headers["Authorization"], body))
        self.send_response(Handler.answer[0])
        self.end_headers()
        self.wfile.write(Handler.answer[1].encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def connection() -> Iterator[Connection]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.seen = []
    yield Connection(f"http://127.0.0.1:{server.server_port}", "secret")
    server.shutdown()


def test_events_are_read_one_by_one(connection: Connection) -> None:
    events = [{"column": 0, "weights": "ab"}, {"column": 0, "delta": "Hi 好"}, {"column": 0, "finish_reason": "stop"}]
    Handler.answer = (200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")
    found = list(
        chat_client.stream_compare(connection, [Column("base", [{"role": "user", "content": "x"}])], Sampling())
    )
    assert found == [Event(0, weights="ab"), Event(0, delta="Hi 好"), Event(0, finish_reason="stop")]
    token, body = Handler.seen[0]
    assert token == "Bearer secret"
    assert body["columns"] == [{"model": "base", "messages": [{"role": "user", "content": "x"}]}]
    assert body["sampling"] == {
        "max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 0, "top_k": 0, "repetition_penalty": 1.0,
        "stop": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, "{}"), "refused the token"),
        ((400, '{"error": {"message": "The chat is too long."}}'), "The chat is too long."),
        ((500, "oops"), "answered 500"),
    ],
)
def test_errors_say_what_the_server_said(connection: Connection, answer: tuple[int, str], words: str) -> None:
    Handler.answer = answer
    with pytest.raises(ServerError, match=words):
        chat_client.chat(connection, "base", [], Sampling())
    with pytest.raises(ServerError, match=words):
        next(chat_client.stream_compare(connection, [], Sampling()))


def test_a_server_that_is_gone() -> None:
    with pytest.raises(ServerError, match="start it again"):
        chat_client.list_models(Connection("http://127.0.0.1:9", "x"))


def test_waiting_ends_with_the_job(project: Project, tmp_path: Path) -> None:
    job = Job(kind="serve", log_path=str(tmp_path / "job.log"))
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
        store_jobs.move(db, job.id, "failed", "No such model.")
    with pytest.raises(ServerError, match="No such model."):
        chat_client.wait_until_ready(project.folder, job, 5)


def test_waiting_has_an_end(project: Project) -> None:
    job = Job(kind="serve")
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
    assert jobs.get(project.folder, job.id).live
    with pytest.raises(ServerError, match="not ready within"):
        chat_client.wait_until_ready(project.folder, job, 0.3)
