"""`push` against a hub of our own on the loopback: what arrives, under which name, and what never leaves."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from studio.engine import push
from studio.errors import StudioError
from tests.engine.test_convert import Job

TOKEN = "hf_CANARYcanaryCANARY"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload speaks to."""

    created: list[dict[str, Any]]
    files: dict[str, bytes]
    tokens: set[str]
    status: int

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.reply({"url": f"http://{self.headers['Host']}/me/luna", "name": "me/luna"})
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            return self.reply(
                {"files": [{"path": w["path"], "uploadMode": "regular", "shouldIgnore": False} for w in wanted]}
            )
        if "/commit/" not in self.path:
            return self.reply({"errors": [], "warnings": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.reply(
            {"commitUrl": f"http://{self.headers['Host']}/me/luna/commit/1", "commitOid": "1", "success": True}
        )

    def do_GET(self) -> None:  # noqa: N802
        self.reply({"id": "me/luna", "modelId": "me/luna", "sha": "0", "siblings": [], "tags": []})

    def reply(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("OwnHub", (Hub,), {"created": [], "files": {}, "tokens": set(), "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)  # read when a process imports the package
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "luna"
    folder.mkdir()
    files = {"README.md": "# Luna\n", "luna-f16.gguf": "GGUF", "luna.zip": "PK", "retune_weights.json": "{}"}
    for name, text in (files | {"gate.json": '{"passed": true}'}).items():
        (folder / name).write_text(text)
    return folder


def push_it(folder: Path, **args: Any) -> dict[str, Any]:
    return push.run(Job(folder.parent, export=str(folder), hub="huggingface", repo="me/luna", **args))


def test_an_export_arrives_in_a_private_repository(hub: type[Hub], exported: Path) -> None:
    result = push_it(exported)
    assert result["url"].endswith("/me/luna") and not result["public"]
    assert [(each["name"], each["visibility"]) for each in hub.created] == [("luna", "private")]
    assert hub.files == {name: (exported / name).read_bytes() for name in ("README.md", "gate.json", "luna-f16.gguf")}
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in json.dumps(result)
    push_it(exported, public=True)
    assert hub.created[-1]["visibility"] == "public"


def test_a_failed_export_stays_unless_asked_for(hub: type[Hub], exported: Path) -> None:
    (exported / "gate.json").write_text('{"passed": false, "message": "Failed: it answers otherwise."}')
    with pytest.raises(StudioError, match="failed its gate: Failed: it answers otherwise"):
        push_it(exported)
    assert not hub.created
    assert push_it(exported, despite_gate=True)["repo"] == "me/luna"


def test_refusals_are_told(hub: type[Hub], exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 403
    with pytest.raises(StudioError, match="does not let you write") as refused:
        push_it(exported)
    assert TOKEN not in str(refused.value) and not hub.files
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(StudioError, match="Nobody is logged in"):
        push_it(exported)
    with pytest.raises(StudioError, match="not an export"):
        push_it(exported.parent)
    monkeypatch.setattr(push.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudioError, match="needs the package `modelscope`"):
        push.run(Job(exported.parent, export=str(exported), hub="modelscope", repo="me/luna"))
