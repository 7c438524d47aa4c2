"""`smoke`: a server of another tool is started, asked, compared and ended; here a small one stands for it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from studio.engine import smoke
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
        self.reply({{"choices": [{{"message": {{"content": {answer!r}}}}}]}})
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


def test_the_answer_is_compared_and_the_server_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pid = make_base(tmp_path / "base", torch.float32), tmp_path / "pid"
    right = smoke.answer_of(base)
    job = Job(tmp_path, export=str(base), tool="vllm")
    for answer, passed in ((right, True), (right + "!", False)):
        script = SERVER.format(python=sys.executable, pid=str(pid), answer=answer)
        stands_for(monkeypatch, tmp_path, script)
        found = smoke.run(job)
        assert (found["passed"], found["found"], found["same"]) == (passed, answer, len(right))
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    stands_for(monkeypatch, tmp_path, f"#!{sys.executable}\nimport sys\nsys.exit('no GPU')\n")
    with pytest.raises(StudioError, match="no GPU"):
        smoke.run(job)


def test_only_what_is_installed_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool, words in (("lmdeploy", "not installed"), ("sh", "Allowed: vllm")):
        with pytest.raises(StudioError, match=words):
            smoke.words_of(tool, tmp_path, 1)
