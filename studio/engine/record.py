"""What a training run leaves in the project's database: numbers, samples, events, how far it is.

While the database cannot be written (a full disk, a lock that is held for long), rows wait in memory, in order.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from studio.engine.devices import memory_metric
from studio.engine.loop import StepResult
from studio.errors import StoreBusyError
from studio.store import metrics, open_db, run_events, runs, samples
from studio.store.light import Database
from studio.store.records import now, writing
from studio.store.run_events import RunEvent
from studio.store.samples import Sample

RETRY_SECONDS = 5.0


class Silence:
    """A rank that does not record: another one does."""

    def begin(self, num_steps: int, step: int, stored: dict[str, int]) -> None: ...

    def began(self, step: int, circumstances: dict[str, Any]) -> None: ...

    def note(self, **notes: Any) -> None: ...

    def stored(self, step: int) -> dict[str, int]:
        return {}

    def step(self, step: int, result: StepResult) -> None: ...

    def bad_step(self, step: int, reason: str) -> None: ...

    def measured(self, step: int, values: dict[str, float]) -> None: ...

    def samples(self, step: int, texts: list[Sample]) -> None: ...

    def event(self, step: int, kind: str, **detail: Any) -> None: ...

    def settle(self) -> None: ...

    def flush(self) -> None: ...

    def latest(self) -> dict[str, float]:
        return {}


class Recorder:
    """Writes for one run; each call is one short transaction."""

    def __init__(self, folder: Path, run_id: str, device: torch.device) -> None:
        self._folder = folder
        self._run_id = run_id
        self._device = device
        self._waiting: deque[Callable[[Database], None]] = deque()
        self._tried_at = -RETRY_SECONDS

    def begin(self, num_steps: int, step: int, stored: dict[str, int]) -> None:
        """The run goes on after `step`; what was stored for later steps will be computed again.

        `stored` is the metric cursor of the checkpoint: rows that must be there up to its step.
        """
        with open_db(self._folder) as db:
            runs.update(db, self._run_id, num_steps=num_steps, step=step)
            metrics.forget_after(db, self._run_id, step if step else -1)
            found = metrics.count(db, self._run_id, step)
        if step and any(found[name] < number for name, number in stored.items()):
            self.event(step, "rows_missing", stored=stored, found=found)
            print(f"of the rows stored up to step {step}, {stored} were expected and {found} are there", flush=True)

    def began(self, step: int, circumstances: dict[str, Any]) -> None:
        """Under what circumstances the steps after this one are computed; those of steps that were left are dropped."""

        def write(db: Database) -> None:
            before = runs.get(db, self._run_id).detail.get("began", [])
            kept = [each for each in before if each["step"] < step]
            runs.note(db, self._run_id, began=[*kept, {"step": step, "circumstances": circumstances}])

        self._write(write)

    def note(self, **notes: Any) -> None:
        """What the run is to remember, in its detail."""
        self._write(lambda db: runs.note(db, self._run_id, **notes))

    def stored(self, step: int) -> dict[str, int]:
        """The metric cursor: how many rows there are up to a step. Raises StoreBusyError while some still wait."""
        self.settle()
        with open_db(self._folder) as db:
            return metrics.count(db, self._run_id, step)

    def step(self, step: int, result: StepResult) -> None:
        """Numbers of a finished step."""
        values = {
            "train/loss": result.loss,
            "train/learning_rate": result.learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/trained_tokens": float(result.num_trained_tokens),
            "train/tokens_per_second": result.num_tokens / result.seconds,
            "train/step_seconds": result.seconds,
            **memory_metric(self._device),
        }
        self._numbers(step, values)

    def bad_step(self, step: int, reason: str) -> None:
        """A step that was not taken: a gap in the curves, and why."""
        self._numbers(step, {"train/loss": float("nan"), "train/grad_norm": float("nan")})
        self.event(step, "bad_step", reason=reason)

    def measured(self, step: int, values: dict[str, float]) -> None:
        """Numbers measured at a step border, by the names of their metrics."""
        at = now()
        self._write(lambda db: metrics.record(db, self._run_id, step, values, at))

    def samples(self, step: int, texts: list[Sample]) -> None:
        self._write(lambda db: samples.add(db, texts))

    def event(self, step: int, kind: str, **detail: Any) -> None:
        """Something besides the numbers; see studio.store.run_events."""
        event = RunEvent(self._run_id, step, kind, detail)
        self._write(lambda db: run_events.add(db, event))

    def settle(self) -> None:
        """Write what waits, and let it reach the disk, so that a checkpoint never knows more than the database.

        Raises StoreBusyError when that cannot be done now.
        """
        self._write_waiting()
        with open_db(self._folder) as db:
            db.execute("PRAGMA synchronous=FULL")  # this commit carries all before it to the disk
            with writing(db):
                db.execute("update runs set step = step where id = ?", [self._run_id])

    def flush(self) -> None:
        """Write what waits, if that can be done now."""
        try:
            self._write_waiting()
        except StoreBusyError as error:
            print(f"{len(self._waiting)} rows wait in memory: {error}", flush=True)

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        with open_db(self._folder) as db:
            return metrics.latest(db, self._run_id)

    def _numbers(self, step: int, values: dict[str, float]) -> None:
        at = now()

        def write(db: Database) -> None:
            with writing(db):
                runs.update(db, self._run_id, step=step)
                metrics.record(db, self._run_id, step, values, at)

        self._write(write)

    def _write(self, row: Callable[[Database], None]) -> None:
        self._waiting.append(row)
        if len(self._waiting) > 1 and time.monotonic() - self._tried_at < RETRY_SECONDS:
            return
        self.flush()

    def _write_waiting(self) -> None:
        """Raises StoreBusyError."""
        self._tried_at = time.monotonic()
        if self._waiting:
            with open_db(self._folder) as db:
                while self._waiting:
                    self._waiting[0](db)
                    self._waiting.popleft()
