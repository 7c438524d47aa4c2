"""Driving the tools' workers: one process each, which waits between rounds on a pipe."""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

WORKER = Path(__file__).with_name("worker.py")
READY_SECONDS, ROUND_SECONDS = 300, 1200


@dataclass(frozen=True)
class Setting:
    """A tool and how it is set up. Best settings are measured in every round, defaults in fewer."""

    tool: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.tool} {self.kind}"

    @property
    def is_slow(self) -> bool:
        """Other tools' defaults."""
        return self.kind == "default" and not self.is_ours

    @property
    def is_ours(self) -> bool:
        return self.tool == "retune"


SETTINGS = (
    Setting("retune", "default"),
    Setting("transformers", "best"),
    Setting("trl", "best"),
    Setting("llamafactory", "best"),
    Setting("transformers", "default"),
    Setting("trl", "default"),
    Setting("llamafactory", "default"),
)


class ToolFailed(Exception):
    """A job ended where it should have gone on; the message ends with the last lines that the tool printed."""


class Tool:
    """A worker process. A job that fails leaves it usable."""

    def __init__(self, setting: Setting, python: Path, repository: Path, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
        if setting.is_ours:  # others must not find the studio's packages before their own
            environment["PYTHONPATH"] = str(repository)
        self._log = log
        self._process = subprocess.Popen(
            [str(python), str(WORKER), setting.tool],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(log, "wb"), env=environment,
        )  # fmt: skip
        self._rest = b""
        hello = self._hear(READY_SECONDS)
        if "hello" not in hello:
            raise ToolFailed(f"{setting.name} did not start. {self._last_lines()}")
        self.versions: dict[str, str] = hello["hello"]
        self.threads: int = hello["threads"]

    def begin(self, job: dict[str, Any]) -> None:
        """Start a job; returns when its first step is next. Raises ToolFailed."""
        self._say(job)
        self._expect("ready", READY_SECONDS)

    def round(self, num_steps: int, seconds: float, most: int) -> dict[str, Any]:
        """Train so many steps, then more until so many seconds are over, `most` in all. Raises ToolFailed."""
        self._say({"steps": num_steps, "seconds": seconds, "most": most})
        return self._expect("round", ROUND_SECONDS)

    def ask(self, job: dict[str, Any], answer: str) -> Any:
        """A job that trains no rounds. Raises ToolFailed."""
        self._say(job)
        found = self._expect(answer, ROUND_SECONDS)
        self._expect("ended", READY_SECONDS)
        return found

    def end(self) -> None:
        """No more rounds: wait until the job has left its memory."""
        self._say({"steps": 0})
        self._expect("ended", READY_SECONDS)

    def close(self) -> None:
        for child in psutil.Process(self._process.pid).children():
            child.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(message) + "\n").encode())
        self._process.stdin.flush()

    def _expect(self, name: str, seconds: float) -> Any:
        message = self._hear(seconds)
        if name in message:
            return message[name]
        if message.get("ended") == -signal.SIGKILL:
            raise ToolFailed("killed, as the system does where memory is used up")
        raise ToolFailed(f"ended with {message.get('ended')}: {self._last_lines()}")

    def _hear(self, seconds: float) -> dict[str, Any]:
        """The next message; that of a job's end when it said nothing for so long, {} when the worker is gone."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                print(f"No word for {seconds} seconds; the job is ended.", file=sys.stderr)
                for child in psutil.Process(self._process.pid).children():
                    child.terminate()
                seconds = READY_SECONDS
                continue
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                return {}
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " ".join(" / ".join(lines[-2:]).split())[-300:]
