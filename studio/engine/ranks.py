"""`python -m studio.engine.ranks JOB_DIR`: one of the processes that train a run together, led by the job's.

Rank 0 writes phases, progress, numbers and samples; how each ends is told to the job in a file of its own.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from studio import processes
from studio.config.launch import slurm_rank_variables
from studio.engine import environment, tuning
from studio.engine.job import JobContext, PatientOutput, explain
from studio.engine.launch import REPORTS, write_began
from studio.errors import DiskFullError, StudioError
from studio.paths import atomic_write_json
from studio.store.jobs import Job

PARENT_LOOK_SECONDS = 1.0
# What a rank sees when another one is gone, in gloo's and NCCL's words.
LOST_OTHERS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Socket Timeout",
               "NCCL", "Broken pipe", "Timed out waiting", "recvValue failed", "DistNetworkError")  # fmt: skip


class RankContext(JobContext):
    """The job as a rank sees it. Only rank 0 reads requests and writes to the database, none of them the state."""

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    def __enter__(self) -> "RankContext":
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._handlers[each] = signal.signal(each, self._on_signal)
        for each in processes.STOP_SIGNALS.values():
            self._handlers[each] = signal.signal(each, self._on_request)
        write_began(self.job_dir, self.rank)
        leader = os.environ.get("RETUNE_JOB_PID")
        if leader and "SLURM_PROCID" not in os.environ:  # srun's tasks are on other machines, and srun ends them
            threading.Thread(target=self._watch, args=(int(leader),), daemon=True, name="leader").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None and not self._ended.is_set():
            self._end_with(error)
        return True

    def phase(self, phase: str, total: int = 0, unit: str = "", current: int = 0) -> None:
        if self.rank == 0:
            super().phase(phase, total, unit, current)

    def progress(self, current: int, total: int | None = None, unit: str | None = None) -> None:
        if self.rank == 0:
            super().progress(current, total, unit)

    def requests(self) -> Job:
        if self.rank == 0:
            return super().requests()
        return Job("", id=self.id, stop_request=self.told_to_stop)

    def check_stop(self) -> None:
        """Ranks stop together, at a step border, or not at all."""

    def _end_with(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, StudioError):
            traceback.print_exception(error)
        lost = not isinstance(error, StudioError) and any(each in text for each in LOST_OTHERS)
        self._report("failed", explain(error, self.folder), {}, lost_others=lost)

    def _end(self, state: str, cause: str, result: dict[str, Any]) -> None:
        if not self._ended.is_set():
            self._report(state, cause, result)

    def _report(self, state: str, cause: str, result: dict[str, Any], lost_others: bool = False) -> None:
        self._ended.set()
        self.exit_code = 1 if state == "failed" else 0
        report = {"rank": self.rank, "state": state, "cause": cause, "result": result, "at": time.time()}
        try:
            atomic_write_json(self.job_dir / REPORTS / f"{self.rank}.json", report | {"lost_others": lost_others})
        except (DiskFullError, OSError) as full:  # the log has what there is room for
            self.exit_code = 1
            print(f"rank {self.rank} {state}, which cannot be written: {full} {cause}", file=sys.stderr, flush=True)

    def _watch(self, leader: int) -> None:
        """A rank does not outlive the job that leads it, whatever it is waiting for."""
        while psutil.pid_exists(leader):
            time.sleep(PARENT_LOOK_SECONDS)
        os._exit(1)


def main(job_dir: Path) -> int:
    """Train as one rank to the end; the exit code is 0 unless it failed."""
    os.environ.update(slurm_rank_variables())
    os.environ.setdefault("GOMP_SPINCOUNT", tuning.DEFAULT_SPIN)
    environment.prepare()
    is_first = os.environ.get("RANK", "0") == "0"
    with open(os.devnull, "w") as nowhere:  # rank 0 alone speaks; what is wrong goes to stderr
        out = PatientOutput(sys.stdout if is_first else nowhere)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(PatientOutput(sys.stderr)):
            return _live(job_dir)


def _live(job_dir: Path) -> int:
    with RankContext.open(job_dir) as job:
        from studio.engine import train  # torch, once this process can say what became of it

        job.finish(train.run(job))
    return job.exit_code


if __name__ == "__main__":
    paths = [each for each in sys.argv[1:] if not each.startswith("--local")]  # DeepSpeed's launcher adds --local_rank
    if len(paths) != 1:
        sys.exit("usage: python -m studio.engine.ranks JOB_DIR")
    code = main(Path(paths[0]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo and DeepSpeed may still wait for ranks that are gone
