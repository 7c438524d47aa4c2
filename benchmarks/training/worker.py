"""One tool's side of `train.py`: python worker.py TOOL, in that tool's environment.

Lives as long as the measurement. It imports the tool once and forks for each job, so a job begins with memory of its
own and without waiting for imports. Talks in JSON lines: stdin brings jobs and, while one runs, rounds; what a tool
prints goes to stderr. Knows nothing of the studio: the environments of other tools do not have it.
"""

import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TOLD = ("torch", "transformers", "peft", "trl", "llamafactory", "accelerate", "datasets", "bitsandbytes")


@dataclass
class Counts:
    """Tokens of a step: of its rows, those trained, those computed without padding, and with it."""

    effective: int = 0
    trained: int = 0
    real: int = 0
    computed: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class Channel:
    """JSON lines through two file descriptors, unbuffered, so that a forked child can go on reading."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write

    def say(self, **message: Any) -> None:
        os.write(self._write, (json.dumps(message) + "\n").encode())

    def hear(self) -> dict[str, Any] | None:
        """The next message; None when the other side is gone."""
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = os.read(self._read, 1)
            if not byte:
                return None
            line += byte
        found: dict[str, Any] = json.loads(line)
        return found


class Over(BaseException):
    """The driver wants no more rounds; no tool may take it for an error of its own."""


class Meter:
    """Lets a job train the steps of a round, when it is told to, and tells what they took.

    The clock runs from the word to go until the last step of the round is done, data preparation included.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def ready(self) -> None:
        """Call when the next thing is the first step; returns when the first round may begin."""
        self._channel.say(ready=True)
        self._wait()

    def step(self, loss: float, counts: Counts) -> None:
        """Call after each optimizer step; returns when the next may begin. Raises Over after the last round."""
        self._losses.append(loss)
        self._counts.add(counts)
        taken, has_lasted = len(self._losses), time.perf_counter() - self._clock >= self._round["seconds"]
        if taken >= self._round["most"] or (taken >= self._round["steps"] and has_lasted):
            self._tell()
            self._wait()

    def _wait(self) -> None:
        message = self._channel.hear()
        if message is None:
            sys.exit("The measurement is gone.")
        if not message["steps"]:
            raise Over
        self._round = message
        self._losses: list[float] = []
        self._counts = Counts()
        self._cpu, self._clock = time.process_time(), time.perf_counter()

    def _tell(self) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._clock, time.process_time() - self._cpu
        figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": self._losses, "peak_bytes": peak_bytes()}
        self._channel.say(round=figures | {"tokens": asdict(self._counts)})


def peak_bytes() -> int:
    """The most memory that this process has had at once since it began (resident set, as Linux keeps it)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmHWM"].split()[0]) * 1024


def read_rows(path: str) -> list[dict[str, list[int]]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def serve(tool: str) -> None:
    """Import the tool, then do the jobs that come in, one after the other, each in a child."""
    channel = Channel(0, os.dup(1))
    os.dup2(2, 1)
    module = importlib.import_module(f"with_{tool}")
    import torch

    channel.say(hello=_versions(), threads=torch.get_num_threads())
    while (job := channel.hear()) is not None:
        if "do" not in job:  # a round for a job that was killed while it waited
            continue
        child = os.fork()
        if not child:
            os._exit(_do(module, job, channel))
        _, status = os.waitpid(child, 0)
        channel.say(ended=os.waitstatus_to_exitcode(status))


def _do(module: Any, job: dict[str, Any], channel: Channel) -> int:
    try:
        what = getattr(module, job["do"])
        what(job, Meter(channel), channel)
    except Over:
        return 0
    except BaseException:  # whatever it is belongs to this job alone, and the driver shows it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for name in TOLD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    serve(sys.argv[1])
