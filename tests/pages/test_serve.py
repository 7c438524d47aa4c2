"""The Serve page: start, endpoint with a hidden token, examples that run, stop."""

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from studio import runs
from studio.other_servers import server_lines
from studio.request_log import Asked, RequestLog
from studio.server_key import own_key
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


def press(at, label):
    next(button for button in at.button if button.label == label).click().run()


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
    press(at, "Start")
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
    press(at, "Start")
    assert not at.exception
    assert [(kind, args["base"], len(args["adapters"])) for kind, args in started] == [("serve", "*owner*/name", 1)]


def test_token_is_hidden_until_asked_for(open_page, server, started):
    at = open_page(PAGE)
    assert "secret-token" not in "\n".join(codes(at))
    at.toggle(key=f"serve.show.{server.job.id}").set_value(True).run()
    assert "secret-token" in codes(at)


def test_what_is_loaded_can_be_taken_out(open_page, server, started):
    at = open_page(PAGE)
    assert any("1.0 GB in memory" in caption.value for caption in at.caption)
    at.button(key=f"serve.out.{server.job.id}.lora-1-step_20").click().run()
    assert server.models == ["starter"]
    assert not [button for button in at.button if button.label == "Take out"]


def test_requests_are_listed_without_words(open_page, project, server, started):
    folder = project.path("jobs", server.job.id)
    assert any("Nobody asked yet" in caption.value for caption in open_page(PAGE).caption)
    asked = {"prompt_tokens": 9, "answer_tokens": 4, "seconds": 0.5, "first_seconds": 0.1, "end": "stop"}
    log = RequestLog(folder)
    log.add(Asked(at="2026-01-01T00:00:00+00:00", who="curl", model="starter", prompt="secret", **asked))
    [table] = open_page(PAGE).dataframe
    [row] = table.value.to_dict("records")
    assert (row["Who"], row["Answer tokens"], row["Ended"]) == ("curl", 4, "by itself")
    assert "secret" not in str(row)


def test_a_key_of_ones_own(open_page, project, started):
    at = open_page(PAGE)
    at.text_input(key="serve.key.text").set_value("short")
    press(at, "Save")
    assert "16 to 200" in at.error[0].value
    at.text_input(key="serve.key.text").set_value("a-key-of-my-own-1234")
    press(at, "Save")
    assert own_key() == "a-key-of-my-own-1234"
    at.button(key="serve.key.forget").click().run()
    assert own_key() == ""


def test_start_passes_the_limits_on(open_page, project, started):
    at = open_page(PAGE)
    at.number_input(key="serve.unload").set_value(10)
    at.number_input(key="serve.longest").set_value(300)
    press(at, "Start")
    kept = {key: started[0][1][key] for key in ("unload_seconds", "max_answer_tokens", "max_waiting", "log_words")}
    assert kept == {"unload_seconds": 600, "max_answer_tokens": 300, "max_waiting": 128, "log_words": 0}


def test_other_servers_lines_name_base_and_adapters(tmp_path):
    vllm, lmdeploy = server_lines("org/model", {"mine": tmp_path / "a b"}, 8001)
    words = shlex.split(vllm.command)
    assert words[:3] == ["vllm", "serve", "org/model"] and f"mine={tmp_path / 'a b'}" in words
    assert words[words.index("--port") + 1] == "8001" and not vllm.is_installed
    assert shlex.split(lmdeploy.command)[:4] == ["lmdeploy", "serve", "api_server", "org/model"]
    assert "--backend pytorch --adapters" in lmdeploy.command, "TurboMind leaves adapters out without a word"


def test_vllm_is_told_of_high_ranks_and_of_another_template(tmp_path):
    """It refuses ranks above 16, and speaks to adapters by the base's template."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "chat_template.jinja").write_text("one")
    (base / "config.json").write_text("{}")
    for name, config, template in (("low", {"r": 16}, "one"), ("high", {"r": 8, "rank_pattern": {"q": 40}}, "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / name / "chat_template.jinja").write_text(template)
    low = server_lines(str(base), {"low": tmp_path / "low"})[0].command
    assert "--max-lora-rank" not in low and "--chat-template" not in low
    both = shlex.split(server_lines(str(base), {name: tmp_path / name for name in ("low", "high")})[0].command)
    assert both[both.index("--max-lora-rank") + 1] == "64"
    assert both[both.index("--chat-template") + 1] == str(tmp_path / "high" / "chat_template.jinja")


@pytest.mark.parametrize("config", ["[]", "{", '{"r": "x", "rank_pattern": [1]}', '{"rank_pattern": {"q": {}}}'])
def test_lines_are_there_for_adapters_that_are_damaged(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    line = server_lines("org/model", {"mine": tmp_path})[0].command
    assert "--max-lora-rank" not in line and f"mine={tmp_path}" in line


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
        press(at, "Start")
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
    assert at.multiselect(key="serve.more").options == ["lora-1 · step 40"]
    at.multiselect(key="serve.more").set_value(["lora-1-step_40"])
    press(at, "Load")
    assert server.models == ["starter", "lora-1-step_20", "lora-1-step_40"]
    assert "Every converted checkpoint is loaded." in [caption.value for caption in at.caption]
    assert not started
    with open_db(project.folder) as db:
        store_jobs.move(db, store_jobs.listed(db)[0].id, "stopped", "")
    at.run()  # what the one was given is not what the next begins with
    assert at.multiselect(key="serve.adapters").value == ["lora-1-step_40"]
