"""`smoke`: a server of another tool is started, asked, compared and ended; here a small one stands for it."""

import os
import sys
from pathlib import Path

import psutil
import pytest
import torch

from studio.data.template import read_json
from studio.engine import smoke
from studio.engine.equality import PROBES
from studio.errors import StudioError
from tests.engine.folders import make_base
from tests.engine.test_convert import Job

SERVER = """#!{python}
import http.server, json, os, sys
assert sys.argv[1] == "serve" and sys.argv[3:5] == ["--host", "127.0.0.1"], sys.argv
open({pid!r}, "w").write(str(os.getpid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({{"data": []}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and asked["model"] == sys.argv[2], asked
        answer = {answers!r}[asked["messages"][0]["content"]]
        self.reply({{"choices": [{{"message": {{"content": answer}}}}]}})
    def reply(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[6])), Handler).serve_forever()
"""


def stands_for(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "vllm").write_text(script)
    (folder / "bin" / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def test_the_answers_are_compared_and_the_server_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pid = make_base(tmp_path / "base", torch.float32), tmp_path / "pid"
    right = dict(zip(PROBES, smoke.answers_of(base), strict=True))
    job = Job(tmp_path, export=str(base), tool="vllm")
    for answers, passed in ((right, True), (right | {PROBES[2]: "Paris!"}, False)):
        stands_for(monkeypatch, tmp_path, SERVER.format(python=sys.executable, pid=str(pid), answers=answers))
        found = smoke.run(job)
        told = PROBES[0 if passed else 2]
        assert (found["passed"], found["same"], found["all"]) == (passed, 8 - (not passed), 8)
        assert (found["question"], found["expected"], found["found"]) == (told, right[told], answers[told])
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_a_server_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM ends with an error that points above, at the one that tells something."""
    job = Job(tmp_path, export=str(make_base(tmp_path / "base", torch.float32)), tool="vllm")
    several = "print('(Worker) ERROR [x.py:9] ValueError: no room'); sys.exit('RuntimeError: See root cause above.')"
    for script, words in (("sys.exit('no GPU')", "at once: no GPU"), (several, "at once: ValueError: no room")):
        stands_for(monkeypatch, tmp_path, f"#!{sys.executable}\nimport sys\n{script}\n")
        with pytest.raises(StudioError, match=words):
            smoke.run(job)


def test_vllm_asks_for_no_more_memory_than_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    stands_for(monkeypatch, tmp_path, "")
    words = smoke.words_of("vllm", base, 1)
    memory = psutil.virtual_memory()
    assert 0 < float(words[words.index("--gpu-memory-utilization") + 1]) < memory.available / memory.total
    own = read_json(base / "config.json")["max_position_embeddings"]
    assert words[words.index("--max-model-len") + 1] == str(min(own, smoke.LONGEST_CONTEXT))


def test_only_what_is_installed_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool, words in (("lmdeploy", "not installed"), ("sh", "Allowed: vllm")):
        with pytest.raises(StudioError, match=words):
            smoke.words_of(tool, tmp_path, 1)
