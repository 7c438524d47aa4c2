"""Talks to the process that renders chat templates (rendering.py), and replaces it after it was stopped."""

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from studio.data import rendering
from studio.errors import DataError

MAX_SOURCE_CHARACTERS = 200_000


class RenderWorker:
    """The rendering process of this process: started at the first request, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, source: str, variables: list[dict[str, Any]]) -> list[str]:
        """One text per set of variables. Raises DataError with what went wrong in the template."""
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise DataError(
                f"The chat template has {len(source):,} characters.", f"Allowed: {MAX_SOURCE_CHARACTERS:,}."
            )
        line = json.dumps({"source": source, "variables": variables})
        with self._lock:
            reply = self._exchange(line)
        if "error" in reply:
            raise DataError(
                f"The chat template failed: {reply['error'][:500]}.",
                "Check the messages against the template.",
            )
        texts: list[str] = reply["texts"]
        return texts

    def _exchange(self, line: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            reply: dict[str, Any] = json.loads(answer)
            return reply
        self.close()
        limits = f"{rendering.MAX_SECONDS:.0f} seconds or {rendering.MAX_MEMORY_BYTES >> 20} MB"
        return {"error": f"it was stopped because it needs more than {limits}"}

    def _running(self) -> subprocess.Popen[str]:
        # A forked child must not talk through its parent's pipe.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(rendering.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",  # both sides write JSON with escapes
            )
        return self._process

    def close(self) -> None:
        """End the rendering process; the next request starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.communicate()


WORKER = RenderWorker()
atexit.register(WORKER.close)
