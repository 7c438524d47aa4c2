"""`smoke`: another tool's server is started on a whole model and asked one question; its answer is held against ours.

All three speak OpenAI's protocol. Their own kernels may tip a near tie, so the answers' common beginning is told too.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from studio.engine.chat import prompt_ids
from studio.engine.devices import set_threads
from studio.engine.equality import ANSWER_TOKENS, PROBES
from studio.engine.generate import generate
from studio.engine.job import JobContext
from studio.engine.models.load import load_base
from studio.errors import StudioError
from studio.paths import inside

TOOLS = {
    "vllm": [
        "vllm", "serve", "FOLDER", "--host", "127.0.0.1", "--port", "PORT", "--served-model-name", "FOLDER",
        "--dtype", "float32",
    ],
    "lmdeploy": [
        "lmdeploy", "serve", "api_server", "FOLDER", "--server-name", "127.0.0.1", "--server-port", "PORT",
        "--model-name", "FOLDER",
    ],
    "transformers": ["transformers", "serve", "FOLDER", "--host", "127.0.0.1", "--port", "PORT", "--dtype", "float32"],
}  # fmt: skip
START_SECONDS, ASK_SECONDS, STOP_SECONDS = 600, 300, 20
POLL_SECONDS = 0.5


def run(job: JobContext) -> dict[str, Any]:
    """Args: export (a whole model's folder), tool (vllm, lmdeploy or transformers).

    Returns passed, with both answers. Raises StudioError when the tool is not here, ends early or does not answer.
    """
    set_threads()
    folder, tool, port = Path(job.args["export"]), str(job.args["tool"]), _free_port()
    words = words_of(tool, folder, port)
    job.phase("answering here")
    expected = answer_of(folder)
    with _serving(job, words, inside(job.folder, f"exports/.{tool}.log"), port) as http:
        job.phase("asking the other tool")
        found = _ask(http, folder)
    same = os.path.commonprefix([expected, found])
    return {"passed": found == expected, "tool": tool, "expected": expected, "found": found, "same": len(same)}


def words_of(tool: str, folder: Path, port: int) -> list[str]:
    """The tool's command line. Raises StudioError for a tool that is not known or not installed."""
    if tool not in TOOLS:
        raise StudioError(f"There is no smoke check with {tool!r}.", f"Allowed: {', '.join(TOOLS)}.")
    own = Path(sys.executable).parent  # where the package of a tool lies when it was installed beside us
    program = shutil.which(tool) or shutil.which(tool, path=str(own))
    if program is None:
        raise StudioError(f"{tool} is not installed: it is not on the PATH.", f"Install {tool}, or copy its command.")
    values = {"FOLDER": str(folder), "PORT": str(port)}
    return [program, *(values.get(word, word) for word in TOOLS[tool][1:])]


def answer_of(folder: Path) -> str:
    """The greedy answer to the first probe, by the folder as it is read here."""
    loaded = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    prompt = prompt_ids(loaded, [{"role": "user", "content": PROBES[0]}])
    (answer,) = generate(
        loaded.model, [prompt], eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, max_new_tokens=ANSWER_TOKENS
    )
    return loaded.tokenizer.decode(answer).strip()


@contextmanager
def _serving(job: JobContext, words: list[str], log: Path, port: int) -> Iterator[httpx.Client]:
    """A client of the server, once it answers; the server is ended afterwards, whatever happens."""
    job.phase("starting the other tool")
    log.parent.mkdir(parents=True, exist_ok=True)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=offline
        )
        try:
            _wait_for(job, http, process, log)
            yield http
        finally:
            _end(process)


def _wait_for(job: JobContext, http: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        job.check_stop()
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise StudioError(f"The server ended at once: {said[-1] if said else 'it printed nothing'}", f"See {log}.")
        try:
            if http.get("/v1/models", timeout=ASK_SECONDS).is_success:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(POLL_SECONDS)
    raise StudioError(f"The server did not answer within {START_SECONDS} s.", f"See {log}.")


def _ask(http: httpx.Client, folder: Path) -> str:
    body = {
        "model": str(folder), "messages": [{"role": "user", "content": PROBES[0]}],
        "temperature": 0, "max_tokens": ANSWER_TOKENS,
    }  # fmt: skip
    try:
        reply = http.post("/v1/chat/completions", json=body, timeout=ASK_SECONDS)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"]).strip()
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise StudioError(
            f"The server does not answer as OpenAI's would: {error}.", "Its log is in exports/."
        ) from error


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
