"""`retune server`: what a running server has loaded, who asked it, adapters out, and a key of one's own."""

import json
from collections.abc import Iterator

import psutil
import pytest

from studio.projects import Project
from studio.request_log import Asked, RequestLog
from studio.server_key import own_key
from studio.store import jobs, open_db
from studio.store.jobs import Job
from tests.cli.conftest import Retune
from tests.pages.model_server import ModelServer


@pytest.fixture
def server(project: Project) -> Iterator[ModelServer]:
    """A job whose process is this one, and a server that speaks the wire of the real one."""
    me, made = psutil.Process(), ModelServer(["starter", "lora-1-step_20"])
    with open_db(project.folder) as db:
        row = Job("serve", state="running", pid=me.pid, process_created=me.create_time(), args={"base": "starter"})
        job = jobs.add(db, row)
    folder = project.path("jobs", job.id)
    folder.mkdir(parents=True)
    connection = {"url": made.connection.url, "token": made.connection.token}
    (folder / "connection.json").write_text(json.dumps(connection))
    RequestLog(folder).add(Asked("2026-01-01T00:00:00+00:00", "curl", "starter", 9, 4, 0.5, 0.1, "cancelled"))
    yield made
    made.close()


def test_a_running_server_is_looked_at_and_changed(retune: Retune, server: ModelServer) -> None:
    told = json.loads(retune("server", "status", "--json"))
    assert [model["kind"] for model in told["models"]] == ["base", "adapter"]
    assert "lora-1-step_20" in retune("server", "status")
    assert "taken out" in retune("server", "remove", "lora-1-step_20")
    assert server.models == ["starter"]
    assert "out of memory" in retune("server", "unload")
    assert retune("server", "key").strip() == "secret-token"


def test_the_log_says_who_asked(retune: Retune, server: ModelServer) -> None:
    [asked] = json.loads(retune("server", "log", "--json"))
    assert (asked["who"], asked["end"], asked["answer_tokens"]) == ("curl", "cancelled", 4)
    assert "cancelled" in retune("server", "log")


def test_a_key_of_ones_own_is_typed_not_given(retune: Retune, project: Project) -> None:
    assert "16 to 200" in retune("server", "key", "--own", answer="short\n", code=1)
    said = retune("server", "key", "--own", answer="a-key-of-my-own-1234\n")
    assert own_key() == "a-key-of-my-own-1234" and "a-key" not in said
    retune("server", "key", "--forget")
    assert own_key() == ""


def test_without_a_server_it_says_how_to_start_one(retune: Retune, project: Project) -> None:
    assert "retune serve" in retune("server", "status", code=1)
    assert "Nobody asked yet" in retune("server", "log")
