"""Talks to the process that renders chat templates (rendering.py), and replaces it after it was stopped."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studio.data import rendering
from studio.errors import DataError

MAX_SOURCE_CHARACTERS = 200_000
Chat = tuple[list[dict[str, Any]], list[tuple[int, bool]], Any]


class RenderWorker:
    """The rendering process of this process: started at the first request, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, source: str, base: dict[str, Any], chats: Sequence[Chat]) -> list[list[str] | DataError]:
        """For each chat one text per cut, or the DataError that its rendering ended in.

        A chat has messages, cuts and tools; a cut (number, prompt) is the first `number` messages with or without the
        generation prompt. `base` are the template's other variables. Raises DataError when the template's source is
        too long for any chat.
        """
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise DataError(
                f"The chat template has {len(source):,} characters.", f"Allowed: {MAX_SOURCE_CHARACTERS:,}."
            )
        wanted = [{"messages": messages, "cuts": cuts, "tools": tools} for messages, cuts, tools in chats]
        with self._lock:
            replies = self._exchange(json.dumps({"source": source, "base": base, "chats": wanted}))
        if replies is not None:
            return [_result(reply) for reply in replies]
        if len(chats) == 1:
            limits = f"{rendering.MAX_SECONDS:.0f} seconds or {rendering.MAX_MEMORY_BYTES >> 20} MB"
            return [_result({"error": f"it was stopped because it needs more than {limits}"})]
        return [result for chat in chats for result in self.render(source, base, [chat])]

    def _exchange(self, line: str) -> list[dict[str, Any]] | None:
        """The process's answer; None when it was stopped over the question."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        except BaseException:
            self.close()  # its answer was not read: the next question would get it
            raise
        if answer.endswith("\n"):
            replies: list[dict[str, Any]] = json.loads(answer)
            return replies
        self.close()
        return None

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


def _result(reply: dict[str, Any]) -> list[str] | DataError:
    if "error" in reply:
        reason = f"The chat template failed: {reply['error'][:500]}."
        return DataError(reason, "Check the messages against the template.")
    first, *others = reply["texts"]
    return [first, *(first[:text] if isinstance(text, int) else text for text in others)]


WORKER = RenderWorker()
atexit.register(WORKER.close)
