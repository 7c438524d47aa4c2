"""The `train` verb's first half, without torch: tokens into the cache, then the run in this process or in its ranks.

Ranks are children of this process, or of the launcher that it starts. One that dies ends the job with that rank's error
as its cause; none outlives the job.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from studio import processes
from studio.config import launch
from studio.config.schema import RunConfig
from studio.config.yaml import load_config
from studio.data.named import load_template
from studio.data.tokens import TextTokenizer
from studio.engine.job import JobContext
from studio.engine.tokenize import reporting, stored_sources, tokenise
from studio.errors import DiskFullError, JobError, StoreBusyError
from studio.models import require
from studio.paths import REPOSITORY, atomic_write_json, atomic_write_text, inside, remove
from studio.store import jobs as store
from studio.store import open_db, runs

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # for the other ranks to say what they saw, once one has died
REPORTS = "ranks"
BEGAN = "began-"  # in front of a rank's number: the file in which it says which process it is
ENDED = "The processes of this machine have ended; the first machine's job has the run's numbers."


def run(job: JobContext) -> dict[str, Any]:
    """Train. args as in studio.engine.train; `distributed` may spread a resumed run over other processes."""
    config = configured(job)
    if config.distributed.strategy == "none":
        return importlib.import_module("studio.engine.train").run(job)
    _fill_cache(job, config)
    return _lead(job, config)


def configured(job: JobContext) -> RunConfig:
    """The run's frozen config, spread over processes as this job wants it. Raises ConfigError."""
    config = load_config(inside(job.folder, job.args["config"]))
    return launch.spread_anew(config, job.args.get("distributed") or {})


def _fill_cache(job: JobContext, config: RunConfig) -> None:
    """Tokenise before any process group exists: ranks that wait for one of them run into timeouts."""
    job.phase("tokenising", unit="rows")
    folder = require(config.model.base)
    with open_db(job.folder) as db:
        versions = runs.get(db, job.run_id).detail.get("datasets")
    sources = stored_sources(job.folder, config.data, versions)
    template, tokenizer = load_template(config.data.template, folder), TextTokenizer.load(folder)
    for _ in tokenise(job.folder, config.data, sources, template, tokenizer, reporting(job)):
        job.check_stop()


@dataclass
class Started:
    """A process that this one started; `rank` -1 is a launcher with ranks of its own. `is_ended_here`: by this one,
    because another had ended."""

    rank: int
    process: subprocess.Popen[bytes]
    is_ended_here: bool = False
    kills_before: int = field(default_factory=processes.oom_kills)


class Silent:
    """Ranks of this machine that are gone without a word, the first one first. What a launcher started only it could
    wait for, and it tells no more of an end than a number."""

    def __init__(self, reports: Path) -> None:
        self.gone: list[dict[str, Any]] = []
        self._reports = reports
        self._began: dict[str, dict[str, Any]] = {}

    def look(self) -> None:
        """To be called again and again: who is gone first took the others along."""
        for path in self._reports.glob(f"{BEGAN}*.json"):
            if path.name not in self._began and (own := _read(path)):
                self._began[path.name] = own
        for own in self._began.values():
            is_here = own["host"] == socket.gethostname() and own not in self.gone
            if is_here and not processes.lives(own["pid"], own["created"]) and not _said(self._reports, own["rank"]):
                self.gone.append(own)


def write_began(job_dir: Path, rank: int) -> None:
    """Say which process a rank is. On a full disk nothing is said."""
    pid = os.getpid()
    own = {"rank": rank, "pid": pid, "created": processes.created(pid), "host": socket.gethostname()}
    try:
        atomic_write_json(job_dir / REPORTS / f"{BEGAN}{rank}.json", own)
    except (DiskFullError, OSError) as full:
        print(f"rank {rank} began, which cannot be written: {full}", file=sys.stderr, flush=True)


def _lead(job: JobContext, config: RunConfig) -> dict[str, Any]:
    """Start the ranks, wait for them, and end as they did."""
    spread = config.distributed
    place = launch.meeting(spread)
    if not place.port:
        place = launch.Meeting(place.node_rank, place.address, _free_port())
    reports = job.job_dir / REPORTS
    remove(reports)
    reports.mkdir(parents=True)
    job.phase(f"starting {spread.world_size} processes")
    job.hand_over()
    children = _start(job, config, place)
    silent = Silent(reports)
    try:
        _wait(job, children, reports, silent)
        silent.look()
    finally:
        _end(children)
    return _outcome(job, children, reports, place, silent)


def _start(job: JobContext, config: RunConfig, place: launch.Meeting) -> list[Started]:
    spread = config.distributed
    if spread.launcher == "deepspeed":
        atomic_write_text(job.job_dir / launch.HOSTS, launch.hosts(spread))
    if spread.launcher != "none":
        meet = {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}  # srun has no words for it
        return [Started(-1, _spawn(launch.command(spread, place, job.job_dir), meet))]
    line = [sys.executable, "-m", launch.MODULE, str(job.job_dir)]
    return [
        Started(place.node_rank * spread.processes_per_node + each, _spawn(line, _variables(config, place, each)))
        for each in range(spread.processes_per_node)
    ]


def _variables(config: RunConfig, place: launch.Meeting, local_rank: int) -> dict[str, str]:
    """A rank's variables; the cores are shared out among the ranks unless a person has done so."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    threads = str(max(1, cores // config.distributed.processes_per_node))
    return launch.rank_variables(config.distributed, place, local_rank) | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or threads
    }


def _spawn(line: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    own = {"RETUNE_JOB_PID": str(os.getpid())}
    try:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, cwd=REPOSITORY, env={**os.environ, **variables, **own})
    except FileNotFoundError as error:
        raise JobError(f"{line[0]!r} is not on this machine.", "Choose another distributed.launcher.") from error


def _wait(job: JobContext, children: list[Started], reports: Path, silent: Silent) -> None:
    """Until all have ended, or one has failed. A stop signal becomes a request that rank 0 reads at a step border."""
    asked = ""
    while any(child.process.poll() is None for child in children):
        silent.look()
        if any(child.process.poll() for child in children) or _failures(reports):
            return
        if (told := job.told_to_stop) != asked and _ask_to_stop(job, told, reports):
            asked = told
        time.sleep(POLL_SECONDS)


def _ask_to_stop(job: JobContext, how: str, reports: Path) -> bool:
    """Whether rank 0 will read at a step border that the job was told to stop; on a full disk a signal says so."""
    try:
        with open_db(job.folder) as db:
            before = store.get(db, job.id).stop_request
            if not before or (before, how) == ("save", "discard"):
                store.request(db, job.id, stop_request=how)
        return True
    except StoreBusyError:
        first = _read(reports / f"{BEGAN}0.json")
        is_here = first.get("host") == socket.gethostname()
        return is_here and processes.ask_to_stop(first["pid"], first["created"], how)


def _end(children: list[Started]) -> None:
    """No rank is left: those that still run get a moment to say what they saw, and are killed with all they started."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(child.process.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for child in children:
        if child.process.poll() is None:
            child.is_ended_here = True
            with_own = [*_descendants(child.process.pid), psutil.Process(child.process.pid)]
            for each in with_own:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
        child.process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _outcome(
    job: JobContext, children: list[Started], reports: Path, place: launch.Meeting, silent: Silent
) -> dict[str, Any]:
    """The result of rank 0; on another machine than its own, `elsewhere` says where to look for it.

    Raises JobError with the cause when a rank failed.
    """
    if cause := _cause(children, reports, silent.gone):
        raise JobError(cause)
    if place.node_rank:
        print(ENDED, flush=True)
        return {"elsewhere": ENDED}
    report = _read(reports / "0.json")
    if report.get("state") == "stopped":
        job.stopped(report.get("result"), report.get("cause", ""))
    return report.get("result") or {}


def _cause(children: list[Started], reports: Path, gone: Sequence[dict[str, Any]] = ()) -> str:
    """Why the ranks failed, "" when they did not: who broke first, not who lost its neighbours through that.

    `gone`: those of a launcher that said nothing, the first one first.
    """
    failures = _failures(reports)
    for own in (each for each in failures if not each.get("lost_others")):
        return f"Rank {own['rank']}: {own['cause']}"
    own_ends = [child for child in children if not child.is_ended_here]
    for child in own_ends:
        code = child.process.returncode
        if code and code < 0 and child.rank >= 0 and not _said(reports, child.rank):
            return f"Rank {child.rank} {_ended_by(-code, child)}. The log says more."
    broken = [child for child in own_ends if child.process.returncode]
    if gone and children[0].rank < 0 and (failures or broken):
        own = next((each for each in gone if processes.kernel_says_oom(each["pid"])), gone[0])
        is_full = processes.out_of_memory(own["pid"], children[0].kills_before)
        return f"Rank {own['rank']} {processes.OUT_OF_MEMORY if is_full else processes.GONE}. The log says more."
    if failures:
        return f"A rank is gone without a word; rank {failures[0]['rank']} lost it: {failures[0]['cause']}"
    if broken and broken[0].rank < 0 and _signal_in(broken[0].process.returncode) == signal.SIGKILL:
        return f"A rank {processes.KILLED}. The log says more."
    if broken:
        who = f"Rank {broken[0].rank}" if broken[0].rank >= 0 else "The launcher"
        return f"{who} ended with exit code {broken[0].process.returncode}. The log says more."
    return ""


def _signal_in(code: int) -> int:
    """The signal that a launcher's exit code passes on, 0 for none: 128 more (srun), or 256 less (DeepSpeed)."""
    return 256 - code if code >= 192 else code - 128 if code > 128 else 0


def _ended_by(number: int, child: Started) -> str:
    if number != signal.SIGKILL:
        return f"was ended by signal {number} ({signal.Signals(number).name})"
    is_full = processes.out_of_memory(child.process.pid, child.kills_before)
    return processes.OUT_OF_MEMORY if is_full else processes.KILLED


def _failures(reports: Path) -> list[dict[str, Any]]:
    """What failed ranks said of themselves, the earliest first."""
    found = [_read(path) for path in reports.glob("[0-9]*.json")]  # a report that is being written begins with a dot
    return sorted((each for each in found if each.get("state") == "failed"), key=lambda each: each.get("at", 0.0))


def _said(reports: Path, rank: int) -> bool:
    """Whether a rank has told how it ended."""
    return (reports / f"{rank}.json").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])
