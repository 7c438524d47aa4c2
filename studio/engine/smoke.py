"""`smoke`: another tool's server is started on a whole model and asked the probes; its answers are held against ours.

All three speak OpenAI's protocol. Their own kernels may tip a near tie, so the first answer that differs is told.
"""

import os
import re
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
import psutil
import torch

from studio.data.template import read_json
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
        "--dtype", "float32", "--max-model-len", "CONTEXT", "--gpu-memory-utilization", "SHARE", "--enforce-eager",
    ],
    "lmdeploy": [
        "lmdeploy", "serve", "api_server", "FOLDER", "--server-name", "127.0.0.1", "--server-port", "PORT",
        "--model-name", "FOLDER",
    ],
    "transformers": ["transformers", "serve", "FOLDER", "--host", "127.0.0.1", "--port", "PORT", "--dtype", "float32"],
}  # fmt: skip
START_SECONDS, ASK_SECONDS, STOP_SECONDS = 600, 300, 20
POLL_SECONDS = 0.5
LONGEST_CONTEXT = 2048
SHARE_OF_FREE = 0.8
"""Of the memory that is free, what vLLM may take: it asks for a share of all there is, and ends when less is free."""
CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+)")


def run(job: JobContext) -> dict[str, Any]:
    """Args: export (a whole model's folder), tool (vllm, lmdeploy or transformers).

    Returns passed, same of all answers, and of the first that differs (else of the first) the question and both
    answers. Raises StudioError when the tool is not here, ends early or does not answer.
    """
    set_threads()
    folder, tool, port = Path(job.args["export"]), str(job.args["tool"]), _free_port()
    words = words_of(tool, folder, port)
    job.phase("answering here")
    expected = answers_of(folder)
    with _serving(job, words, inside(job.folder, f"exports/.{tool}.log"), port) as http:
        job.phase("asking the other tool", len(PROBES), "questions")
        found = []
        for question in PROBES:
            job.check_stop()
            found.append(_ask(http, folder, question))
            job.progress(len(found))
    same = [one == other for one, other in zip(expected, found, strict=True)]
    shown = 0 if all(same) else same.index(False)
    return {
        "passed": all(same), "tool": tool, "same": sum(same), "all": len(same),
        "question": PROBES[shown], "expected": expected[shown], "found": found[shown],
    }  # fmt: skip


def words_of(tool: str, folder: Path, port: int) -> list[str]:
    """The tool's command line. Raises StudioError for a tool that is not known or not installed."""
    if tool not in TOOLS:
        raise StudioError(f"There is no smoke check with {tool!r}.", f"Allowed: {', '.join(TOOLS)}.")
    own = Path(sys.executable).parent  # where the package of a tool lies when it was installed beside us
    program = shutil.which(tool) or shutil.which(tool, path=str(own))
    if program is None:
        raise StudioError(f"{tool} is not installed: it is not on the PATH.", f"Install {tool}, or copy its command.")
    values = {"FOLDER": str(folder), "PORT": str(port), "CONTEXT": str(_context(folder)), "SHARE": f"{_share():.2f}"}
    return [program, *(values.get(word, word) for word in TOOLS[tool][1:])]


def _context(folder: Path) -> int:
    """Enough for every probe: the whole context of a large model may not fit into memory."""
    own = read_json(folder / "config.json").get("max_position_embeddings")
    return min(own, LONGEST_CONTEXT) if isinstance(own, int) else LONGEST_CONTEXT


def _share() -> float:
    """Of all memory of the device that the tool computes on, what it may take."""
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
    else:
        memory = psutil.virtual_memory()
        free, whole = memory.available, memory.total
    return SHARE_OF_FREE * free / whole


def answers_of(folder: Path) -> list[str]:
    """The greedy answers to the probes, by the folder as it is read here."""
    loaded = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [prompt_ids(loaded, [{"role": "user", "content": each}]) for each in PROBES]
    answers = [
        generate(loaded.model, [prompt], eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, max_new_tokens=ANSWER_TOKENS)
        for prompt in prompts
    ]
    return [loaded.tokenizer.decode(answer).strip() for (answer,) in answers]


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
            raise StudioError(f"The server ended at once: {_cause(log)}", f"See {log}.")
        try:
            if http.get("/v1/models", timeout=ASK_SECONDS).is_success:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(POLL_SECONDS)
    raise StudioError(f"The server did not answer within {START_SECONDS} s.", f"See {log}.")


def _cause(log: Path) -> str:
    """The first error that the server's log names (later ones come of it), else its last line."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = (found[1] for line in said if (found := CAUSE.search(line)))
    return next(errors, said[-1] if said else "it printed nothing")


def _ask(http: httpx.Client, folder: Path, question: str) -> str:
    body = {
        "model": str(folder), "messages": [{"role": "user", "content": question}],
        "temperature": 0, "max_tokens": ANSWER_TOKENS,
    }  # fmt: skip
    try:
        reply = http.post("/v1/chat/completions", json=body, timeout=ASK_SECONDS)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"] or "").strip()
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
