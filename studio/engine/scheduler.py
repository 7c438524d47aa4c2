"""One thread owns the models. It gathers requests into batches and gives every batch a token in turn."""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from studio.engine.chat import TextStream
from studio.engine.generate import Decoding, Sampling
from studio.engine.served import ModelPool, Ready, Weights
from studio.errors import StudioError

GATHER_SECONDS = 0.03  # requests that come this close together share a batch
MAX_ROWS = 32
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """News for whoever asked. The last piece has a finish_reason: stop, length or error."""

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str = ""


@dataclass
class Ask:
    """One chat to be continued; `emit` is called from the scheduler's thread and must not block."""

    weights: Weights
    prompt: list[int]
    sampling: Sampling
    emit: Callable[[Piece], None]
    stops: list[str] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its row leaves the batch."""
        self.cancelled = True


class Scheduler:
    """Start it once; hand in asks and calls from any thread."""

    def __init__(self, pool: ModelPool) -> None:
        self.pool = pool
        self._incoming: queue.SimpleQueue[Ask | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[Ask] = []
        self._batches: list[_Batch] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="scheduler")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all answers where they are."""
        self._stopping = True
        self._incoming.put(None)
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ask(self, *asks: Ask) -> None:
        """Asks handed in together are answered in one batch."""
        for ask in asks:
            self._incoming.put(ask)

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run something on the thread that owns the models, between two tokens."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # it belongs to whoever called
                future.set_exception(error)

        self._incoming.put(run)
        return future

    def _run(self) -> None:
        while not self._stopping:
            self._take_incoming()
            self._form_batches()
            for batch in self._batches:
                self._step(batch)
            self._batches = [batch for batch in self._batches if batch.running]
        for ask in [*self._waiting, *(ask for batch in self._batches for ask in batch.open_asks)]:
            ask.emit(Piece(finish_reason="error", error="The model server was stopped."))

    def _take_incoming(self) -> None:
        """All that has arrived; waits for something when there is nothing to do."""
        if self._batches or self._waiting:
            deadline = time.monotonic()
        else:
            self._accept(self._incoming.get())
            deadline = time.monotonic() + GATHER_SECONDS
        while True:
            try:
                self._accept(self._incoming.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return

    def _accept(self, item: Ask | Callable[[], None] | None) -> None:
        if isinstance(item, Ask):
            self._waiting.append(item)
        elif item is not None:
            item()

    def _form_batches(self) -> None:
        """Asks of one model become a batch, as many as there is room for; the others wait."""
        room = MAX_ROWS - sum(len(batch.open_asks) for batch in self._batches)
        taken, self._waiting = self._waiting[: max(0, room)], self._waiting[max(0, room) :]
        by_model: dict[str, list[Ask]] = {}
        for ask in taken:
            by_model.setdefault(ask.weights.name if ask.weights.is_full_model else "", []).append(ask)
        for asks in by_model.values():
            try:
                self._batches.append(_Batch(self.pool.ready(asks[0].weights), asks))
            except Exception as error:  # loading failed; others go on
                _fail(asks, error)

    def _step(self, batch: "_Batch") -> None:
        """A fault in one batch ends that batch alone."""
        try:
            batch.step()
        except Exception as error:
            _fail(batch.open_asks, error)
            batch.close()


class _Batch:
    """Rows that are decoded together."""

    def __init__(self, ready: Ready, asks: list[Ask]) -> None:
        self._asks = asks
        self._open_rows = set(range(len(asks)))
        self._streams = [TextStream(ready.loaded, ask.stops) for ask in asks]
        self._decoding = Decoding(
            ready.model,
            [ask.prompt for ask in asks],
            [ask.sampling for ask in asks],
            eos_ids=ready.loaded.eos_ids,
            pad_id=ready.loaded.pad_id,
            adapter_names=[ask.weights.adapter for ask in asks],
        )

    @property
    def running(self) -> bool:
        return bool(self._open_rows)

    @property
    def open_asks(self) -> list[Ask]:
        """Those that still wait for text."""
        return [self._asks[row] for row in sorted(self._open_rows)]

    def close(self) -> None:
        """Answer nobody any more."""
        self._open_rows.clear()

    def step(self) -> None:
        for row, ask in enumerate(self._asks):
            if ask.cancelled:
                self._decoding.end(row)
        newest = self._decoding.step()
        running = set(self._decoding.running)
        for row in sorted(self._open_rows):
            if self._asks[row].cancelled or self._report(row, newest[row], row in running):
                self._open_rows.remove(row)

    def _report(self, row: int, token: int | None, running: bool) -> bool:
        """Pass on what a row said; True when that was the last of it."""
        ask, stream = self._asks[row], self._streams[row]
        text = stream.feed(token) if token is not None else ""
        if stream.stopped:
            self._decoding.end(row)
            running = False
        if not running:
            text += stream.finish()
        if text:
            ask.emit(Piece(text))
        if not running:
            by_itself = self._decoding.ended_by_eos[row] or stream.stopped
            num_tokens = len(self._decoding.answers[row])
            ask.emit(Piece(finish_reason="stop" if by_itself else "length", num_tokens=num_tokens))
        return not running


def _fail(asks: list[Ask], error: Exception) -> None:
    traceback.print_exception(error)
    message = str(error) if isinstance(error, StudioError) else f"{type(error).__name__}: {str(error)[:300]}"
    for ask in asks:
        ask.emit(Piece(finish_reason="error", error=message))
