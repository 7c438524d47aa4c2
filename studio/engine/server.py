"""The `serve` verb: a model server on 127.0.0.1 that lives until it is stopped or nobody asks it any more."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from studio.engine.api import Limits, make_app
from studio.engine.devices import pick_device, pick_dtype, set_threads
from studio.engine.gate import Gate
from studio.engine.job import JobContext
from studio.engine.scheduler import MAX_WAITING, Scheduler
from studio.engine.served import ModelPool
from studio.errors import ServerError
from studio.models import require
from studio.paths import atomic_path, inside
from studio.request_log import RequestLog
from studio.server_key import own_key

HOST = "127.0.0.1"
CONNECTION_FILE = "connection.json"
DEFAULT_IDLE_SECONDS = 1800
START_SECONDS = 30
LOOK_SECONDS = 0.5


def run(job: JobContext) -> dict[str, Any]:
    """Serve until stopped or idle.

    Args: base, adapters (name, path), port (0: a free one), idle_seconds (after which it ends), unload_seconds (after
    which it lets go of the weights until somebody asks; 0: never, both); dtype ("auto"), bits (4, 8, 0: as stored),
    template ("": as each was trained), offload_folder; max_waiting, max_answer_tokens, max_prompt_tokens (0: as many as
    the model can); log_words (keep prompts and answers in the log of requests).
    """
    with listening_socket(int(job.args.get("port") or 0)) as listener:
        pool = load_pool(job)
        scheduler = Scheduler(pool, int(job.args.get("max_waiting") or MAX_WAITING))
        scheduler.start()
        try:
            return _serve(job, scheduler, listener)
        finally:
            scheduler.stop()


def load_pool(job: JobContext) -> ModelPool:
    """The base with its adapters, in memory."""
    adapters = job.args.get("adapters") or []
    job.phase("loading the models", 1 + len(adapters), "models")
    set_threads()
    device = pick_device()
    base = job.args["base"]
    dtype = pick_dtype(job.args.get("dtype") or "auto", device)
    offload = job.args.get("offload_folder")
    pool = ModelPool(
        base,
        require(base),
        dtype,
        device,
        template=job.args.get("template") or "",
        bits=int(job.args.get("bits") or 0),
        offload_folder=Path(offload) if offload else None,
    )
    for number, adapter in enumerate(adapters, start=1):
        job.progress(number)
        job.check_stop()
        path = Path(adapter["path"])
        pool.add(adapter["name"], path if path.is_absolute() else inside(job.folder, path))
    return pool


@contextmanager
def listening_socket(port: int) -> Iterator[socket.socket]:
    """A bound socket on the loopback address. Raises ServerError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ServerError(f"Port {port} cannot be used: {error.strerror}.", "Choose another one, or 0.") from error
    try:
        yield listener
    finally:
        listener.close()


def _serve(job: JobContext, scheduler: Scheduler, listener: socket.socket) -> dict[str, Any]:
    port = listener.getsockname()[1]
    token = own_key() or secrets.token_urlsafe(32)
    log = RequestLog(job.job_dir, keeps_words=bool(job.args.get("log_words")))
    limits = Limits(int(job.args.get("max_answer_tokens") or 0), int(job.args.get("max_prompt_tokens") or 0))
    gate = Gate(make_app(scheduler, job.folder, log, limits), token, {f"{HOST}:{port}", f"localhost:{port}"})
    config = uvicorn.Config(
        gate, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="http")
    thread.start()
    connection = job.job_dir / CONNECTION_FILE
    try:
        _wait_until_started(server, thread)
        write_connection(connection, f"http://{HOST}:{port}", token)
        job.phase("ready")
        return _wait_for_the_end(job, scheduler, thread, gate)
    finally:
        connection.unlink(missing_ok=True)
        server.should_exit = True
        thread.join(timeout=10)


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ServerError("The HTTP server did not start.", "The job's log says more.")
        time.sleep(0.02)


def _wait_for_the_end(job: JobContext, scheduler: Scheduler, thread: threading.Thread, gate: Gate) -> dict[str, Any]:
    idle_seconds = float(job.args.get("idle_seconds", DEFAULT_IDLE_SECONDS) or 0)
    unload_seconds = float(job.args.get("unload_seconds") or 0)
    while True:
        time.sleep(LOOK_SECONDS)
        job.check_stop()
        if not thread.is_alive() or not scheduler.alive:
            raise ServerError("A thread of the model server ended.", "The job's log says more; start it again.")
        if idle_seconds and gate.idle_seconds > idle_seconds:
            print(f"nobody asked anything for {idle_seconds:.0f} s", flush=True)
            return {"ended": "idle"}
        if unload_seconds and gate.idle_seconds > unload_seconds and scheduler.pool.is_loaded:
            if scheduler.call(scheduler.unload_when_idle).result():
                job.phase("ready; the weights are loaded again at the next request")


def write_connection(path: Path, url: str, token: str) -> None:
    """Address and token, in a file that only its owner can read."""
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"url": url, "token": token}, file)
