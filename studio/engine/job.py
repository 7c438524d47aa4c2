"""A job as its own process sees it: turn in the queue, heartbeat, progress, requests, and a named end."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import psutil

from studio import processes
from studio.engine.device_lock import DeviceLock
from studio.errors import DiskFullError, JobError, StoreBusyError, StoreError, StudioError
from studio.paths import is_disk_full, job_folders
from studio.store import held_open, open_db
from studio.store import jobs as store
from studio.store.jobs import LEFT_AT_ONCE, Job

HEARTBEAT_SECONDS = 2.0
QUEUE_POLL_SECONDS = 0.5
END_RETRY_SECONDS = (1.0, 3.0, 10.0)
BUSY_RETRY_SECONDS = 3.0
STOPPED = "Stopped on request."
STOPPED_WITHOUT_SAVING = "Stopped on request, without saving."
STOPPED_BY_SYSTEM = "Stopped: the system asked its process to end."


class StopRequested(Exception):
    """Raised at a step border when the person asked the job to stop; `save` says whether to save first."""

    def __init__(self, save: bool) -> None:
        super().__init__("stopped on request")
        self.save = save


class KeepsPlace(Exception):
    """The system ended a process that waited in line: the job stays there, and is given another one."""


class JobContext:
    """Use as a context manager: whatever leaves it becomes the job's state and cause."""

    def __init__(self, folder: Path, job: Job, job_dir: Path) -> None:
        self.folder = folder
        self.id = job.id
        self.args = job.args
        self.run_id = job.run_id
        self.job_dir = job_dir
        self.exit_code = 1
        self._needs_device = job.needs_device
        self._device: DeviceLock | None = None
        self._ended = threading.Event()
        self._progress: dict[str, Any] = {}
        self._stop_signals = 0
        self._asked_by_signal = ""  # to stop, by who could not write it into its row: save or discard
        self._held = False
        self._handlers: dict[int, Any] = {}
        self._open = contextlib.ExitStack()

    @classmethod
    def open(cls, job_dir: Path) -> "JobContext":
        """The job that `studio.jobs.start` wrote into `job_dir`."""
        written = json.loads((job_dir / "job.json").read_text(encoding="utf-8"))
        folder = Path(written["folder"])
        with open_db(folder) as db:
            return cls(folder, store.get(db, written["id"]), job_dir)

    def __enter__(self) -> "JobContext":
        process = psutil.Process()
        with contextlib.suppress(StoreBusyError):
            self._open.callback(held_open(self.folder).close)  # pages can look at the job though the disk is full
        with open_db(self.folder) as db:
            store.beat(db, self.id, pid=process.pid, process_created=process.create_time())
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._handlers[each] = signal.signal(each, self._on_signal)
        for each in processes.STOP_SIGNALS.values():
            self._handlers[each] = signal.signal(each, self._on_request)
        threading.Thread(target=self._beat_until_ended, daemon=True, name="heartbeat").start()
        return self

    def wait_for_turn(self) -> None:
        """Wait until no older live job of any project needs the device.

        Raises StopRequested when asked to stop,
        KeepsPlace when the system asks the process to end: a machine that is shut down must not empty the line.
        """
        if self._needs_device:
            while not self._take_device():
                self._check_stop_in_line()
                if self._held:
                    self.phase("held; it waits until it is released")
                elif self._device and self._device.is_elsewhere:
                    self.phase("waiting for the device, which a job of another studio on this machine has")
                else:
                    self.phase("waiting in line")
                time.sleep(QUEUE_POLL_SECONDS)
        while not self._begun():
            self._check_stop_in_line()
            time.sleep(BUSY_RETRY_SECONDS)
        self.check_stop()

    def _check_stop_in_line(self) -> None:
        if self._asked_to_stop():
            raise StopRequested(save=False)
        if self._stop_signals:
            raise KeepsPlace

    def _begun(self) -> bool:
        """Whether it is stored that the job runs; a disk that is full just now must not take it out of the line."""
        try:
            with open_db(self.folder) as db, contextlib.suppress(JobError):  # a stop request moved it to `stopping`
                store.move(db, self.id, "running")
            return True
        except StoreBusyError as error:
            print(f"its turn has come, and it waits: {error}", file=sys.stderr, flush=True)
            return False

    def _take_device(self) -> bool:
        try:
            with open_db(self.folder) as db:
                own = store.get(db, self.id)
        except StoreBusyError as error:
            print(f"still waiting: {error}", file=sys.stderr, flush=True)
            return False
        self._held = bool(own.held)
        if self._held or any(_goes_first(folder, own) for folder in job_folders()):
            return False
        self._device = self._device or DeviceLock()
        return self._device.take()

    @property
    def told_to_stop(self) -> str:
        """What a signal asked for: save or discard, "" for nothing. The system that ends this process lets it save."""
        return self._asked_by_signal or ("save" if self._stop_signals else "")

    def hand_over(self) -> None:
        """Another process writes phase and progress from here on; this one only shows that it lives."""
        self._progress = {}

    def phase(self, phase: str, total: int = 0, unit: str = "", current: int = 0) -> None:
        """Begin a phase: what is being done now, in words, how much of it there is and how much is done already."""
        if self._progress.get("phase") != phase:
            print(f"[{time.strftime('%H:%M:%S')}] {phase}", flush=True)
        self._progress = {"phase": phase, "current": current, "total": total, "unit": unit}
        self._write_progress()

    def progress(self, current: int, total: int | None = None, unit: str | None = None) -> None:
        """How much of the phase is done; written at most a few times a second, by the heartbeat too."""
        self._progress["current"] = current
        if total is not None:
            self._progress["total"] = total
        if unit is not None:
            self._progress["unit"] = unit
        if time.monotonic() - getattr(self, "_written_at", 0.0) > 0.3:
            self._write_progress()

    def requests(self) -> Job:
        """What was asked for since the last call (save_request, sample_request) and stop_request, if any.

        While the database cannot be used just now, nothing was asked: a full disk must not end a run.
        """
        try:
            with open_db(self.folder) as db:
                job = store.take_requests(db, self.id)
        except StoreBusyError as error:
            print(f"requests cannot be read: {error}", file=sys.stderr, flush=True)
            job = Job("", id=self.id)
        job.stop_request = self._last_word(job.stop_request) or self.told_to_stop
        if job.stop_request == "kill":  # the signal is on its way; nothing is begun any more
            job.stop_request = "discard"
        return job

    def check_stop(self) -> None:
        """Raise StopRequested when the job was asked to stop; other requests stay for `requests`."""
        asked = self._asked_to_stop() or self.told_to_stop
        if asked:
            raise StopRequested(save=asked == "save")

    def _asked_to_stop(self) -> str:
        """What a person asked for, in its row or, while the database cannot be used, by a signal; "" for nothing."""
        with contextlib.suppress(StoreBusyError), open_db(self.folder) as db:
            return self._last_word(store.get(db, self.id).stop_request)
        return self._asked_by_signal

    def _last_word(self, in_row: str) -> str:
        """Of what its row says and what a signal said, which comes when the row can be written no more."""
        return in_row if in_row and self._asked_by_signal != "discard" else self._asked_by_signal

    def finish(self, result: dict[str, Any] | None) -> None:
        """The verb has done all it was asked to."""
        self._end("finished", "", result or {})

    def stopped(self, result: dict[str, Any] | None, cause: str = STOPPED) -> None:
        """The verb ended early because it was asked to, and saved what it was asked to save."""
        self._end("stopped", STOPPED_BY_SYSTEM if self._stop_signals else cause, result or {})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if isinstance(error, KeepsPlace):
                print("the system asked it to end while it waited: it keeps its place in line", flush=True)
                self.exit_code = 0
            elif error is not None and not self._ended.is_set():
                self._end_with(error)
        finally:
            self._ended.set()
            self._open.close()
            if self._device:
                self._device.release()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        return True

    def _end_with(self, error: BaseException) -> None:
        if isinstance(error, StopRequested):
            return self.stopped({})
        if not isinstance(error, StudioError):
            traceback.print_exception(error)
        self._end("failed", explain(error, self.folder), {})
        return None

    def _end(self, state: str, cause: str, result: dict[str, Any]) -> None:
        if self._ended.is_set():
            return
        # First to the log: it is what is left to read when the database cannot be written.
        print(f"[{time.strftime('%H:%M:%S')}] {state}. {cause}".rstrip(), flush=True)
        self._write_progress()
        stored = self._store_end(state, cause, result)
        self.exit_code = 0 if stored and state != "failed" else 1
        self._ended.set()

    def _store_end(self, state: str, cause: str, result: dict[str, Any]) -> bool:
        """Whether the end could be stored, at the latest after some tries; if not, watchers find the job lost."""
        for pause in (*END_RETRY_SECONDS, 0.0):
            try:
                with open_db(self.folder) as db:
                    if result:
                        store.set_result(db, self.id, result)
                    with contextlib.suppress(JobError):  # killed and marked from outside while ending
                        store.move(db, self.id, state, cause)
                return True
            except StoreError as error:
                print(f"the end of this job is not stored: {error}", file=sys.stderr, flush=True)
                time.sleep(pause)
        return False

    def _write_progress(self) -> None:
        self._written_at = time.monotonic()
        try:
            with open_db(self.folder) as db:
                store.beat(db, self.id, **self._progress)
        except StudioError as error:  # a full disk must not end a run; the log keeps the reason
            print(f"progress not stored: {error}", file=sys.stderr, flush=True)

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write_progress()

    def _on_request(self, number: int, _frame: object) -> None:
        """Somebody wants it to stop and cannot write so. Without saving is the last word."""
        asked = next(how for how, each in processes.STOP_SIGNALS.items() if each == number)
        self._asked_by_signal = "discard" if "discard" in (asked, self._asked_by_signal) else asked

    def _on_signal(self, number: int, _frame: object) -> None:
        """First signal to end: stop at the next step border and save. Second: leave at once."""
        self._stop_signals += 1
        if self._stop_signals > 1:
            with contextlib.suppress(OSError):  # past print, which may be at work
                os.write(2, f"{LEFT_AT_ONCE}\n".encode())
            os._exit(128 + number)


class PatientOutput(io.TextIOBase):
    """A log on a disk that may be full: what cannot be written is lost, and must not end hours of training."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._lossy():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lossy():
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @contextlib.contextmanager
    def _lossy(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


def explain(error: BaseException, folder: Path) -> str:
    """One sentence for a person: what ended the job and what to do next."""
    if isinstance(error, StudioError):
        return str(error)
    if is_disk_full(error, folder):
        return str(DiskFullError("The disk is full.", "Free some space and start again; what was saved is unharmed."))
    name = type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in name or "can't allocate memory" in str(error):
        return (
            f"Out of memory ({str(error)[:200]}). Try a smaller train.micro_batch_size with more "
            "gradient_accumulation_steps (the result is the same), gradient_checkpointing, or qlora."
        )
    return f"{name}: {str(error)[:500] or 'no message'}. The log has the details."


def _goes_first(folder: Path, own: Job) -> bool:
    """Whether a live job of this project has the device or comes before; one whose database is damaged must not hold
    up the others."""
    try:
        with open_db(folder) as db:
            rows = store.listed(db, store.LIVE_STATES)
    except StoreError as error:
        print(f"passed over in the queue: {error}", file=sys.stderr, flush=True)
        return False
    others = (row for row in rows if row.needs_device and row.id != own.id and not (row.waiting and row.held))
    return any(row.turn < own.turn and may_live(row) for row in others)


def may_live(job: Job) -> bool:
    """Whether the process of a job that is not marked as ended is there, or about to be."""
    return job.starting or (job.pid > 0 and processes.lives(job.pid, job.process_created))
