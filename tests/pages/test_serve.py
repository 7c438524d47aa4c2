"""The Serve page: start, endpoint with a hidden token, examples that run, stop."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from studio import runs
from studio.store import checkpoints, open_db
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from studio.ui.serve_view import curl_example, openai_example
from studio.ui.widgets import plain
from tests.pages.model_server import ModelServer

PAGE = "pages/6_Serve.py"


@pytest.fixture
def started(monkeypatch):
    calls = []

    def start(folder, kind, args, **more):
        calls.append((kind, args))
        return live_job(folder, kind, args)

    monkeypatch.setattr("studio.jobs.start", start)
    monkeypatch.setattr("studio.models.require", lambda base: Path("a model"))
    monkeypatch.setattr("studio.runs.require", lambda base: Path("a model"))
    return calls


def live_job(folder, kind, args):
    me = psutil.Process()
    job = store_jobs.Job(kind=kind, args=args, state="running", pid=me.pid, process_created=me.create_time())
    with open_db(folder) as db:
        store_jobs.add(db, job)
    (folder / "jobs" / job.id).mkdir(parents=True)
    return job


@pytest.fixture
def server(project):
    server = ModelServer(["starter", "lora-1-step_20"])
    args = {"base": "starter", "adapters": [{"name": "lora-1-step_20", "path": "x"}], "port": 0}
    job = live_job(project.folder, "serve", args)
    connection = {"url": server.connection.url, "token": server.connection.token}
    project.path("jobs", job.id, "connection.json").write_text(json.dumps(connection))
    server.job = job
    yield server
    server.close()


def codes(at):
    return [block.value for block in at.code]


def test_a_base_that_is_not_here_says_how_to_get_it(open_page, project, monkeypatch, tmp_path):
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "none"))
    at = open_page(PAGE)
    assert "is not on this machine yet" in at.error[0].value


def test_start_takes_the_converted_checkpoints(open_page, project, started):
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora"))
        for step in (10, 20):
            checkpoints.put(db, checkpoints.Checkpoint("lora-1", step, f"runs/lora-1/step_{step}.pth", "", 1))
    folder = runs.hf_folder(project, "lora-1", 20)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text("{}")
    at = open_page(PAGE)
    assert at.multiselect(key="serve.adapters").value == ["lora-1-step_20"]
    at.number_input(key="serve.idle").set_value(5)
    at.button[-1].click().run()
    assert not at.exception
    kind, args = started[0]
    assert kind == "serve" and args["idle_seconds"] == 300
    assert args["adapters"] == [{"name": "lora-1-step_20", "path": str(folder)}]


def test_a_run_on_another_base_is_served_on_that_base(open_page, project, started, monkeypatch):
    monkeypatch.setattr("studio.models.resolve", lambda base: SimpleNamespace(present=True, folder=Path("a model")))
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("big-1", "big", "*owner*/name", "lora"))
        checkpoints.put(db, checkpoints.Checkpoint("big-1", 9, "runs/big-1/step_9.pth", "", 1))
    folder = runs.hf_folder(project, "big-1", 9)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text("{}")
    at = open_page(PAGE)
    assert at.multiselect(key="serve.adapters").options == []
    at.selectbox(key="serve.base").select("*owner*/name").run()
    assert at.multiselect(key="serve.adapters").label == f"On the base model {plain('*owner*/name')}"
    at.button[-1].click().run()
    assert not at.exception
    assert [(kind, args["base"], len(args["adapters"])) for kind, args in started] == [("serve", "*owner*/name", 1)]


def test_token_is_hidden_until_asked_for(open_page, server, started):
    at = open_page(PAGE)
    assert "secret-token" not in "\n".join(codes(at))
    at.toggle(key=f"serve.show.{server.job.id}").set_value(True).run()
    assert "secret-token" in codes(at)


def test_stop_asks_the_server_to_stop(open_page, project, server, started):
    at = open_page(PAGE)
    at.button(key=f"serve.{server.job.id}.stop").click().run()
    with open_db(project.folder) as db:
        assert store_jobs.get(db, server.job.id).state == "stopping"


def test_a_server_that_failed_says_why(open_page, project, started):
    job = live_job(project.folder, "serve", {"base": "starter"})
    with open_db(project.folder) as db:
        store_jobs.move(db, job.id, "failed", "Port 80 is taken.")
    assert "Port 80 is taken" in open_page(PAGE).error[0].value.replace("\\", "")


def test_examples_are_a_shell_line_and_a_program(server):
    curl = curl_example("http://127.0.0.1:9", "lora-1-step_20")
    done = subprocess.run(["bash", "-n", "-c", curl], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    compile(openai_example("http://127.0.0.1:9", "starter"), "example", "exec")


def test_chinese(open_page, server, started):
    at = open_page(PAGE, lang="zh")
    assert "接口地址" in [caption.value for caption in at.caption]


def test_a_server_that_loads_is_not_started_twice(open_page, project, started):
    here, other = open_page(PAGE), open_page(PAGE)
    for at in (here, other):
        [button for button in at.button if button.label == "Start"][0].click().run()
        assert not [button for button in at.button if button.label == "Start"]
    assert len(started) == 1


def test_a_running_server_is_given_more_adapters(open_page, project, server, started):
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora"))
        for step in (20, 40):
            checkpoints.put(db, checkpoints.Checkpoint("lora-1", step, f"runs/lora-1/step_{step}.pth", "", 1))
            folder = runs.hf_folder(project, "lora-1", step)
            folder.mkdir(parents=True)
            (folder / "retune_weights.json").write_text("{}")
    at = open_page(PAGE)
    assert at.multiselect(key="serve.adapters").options == ["lora-1 · step 40"]
    at.multiselect(key="serve.adapters").set_value(["lora-1-step_40"])
    [button for button in at.button if button.label == "Load"][0].click().run()
    assert server.models == ["starter", "lora-1-step_20", "lora-1-step_40"]
    assert "Every converted checkpoint is loaded." in [caption.value for caption in at.caption]
    assert not started
