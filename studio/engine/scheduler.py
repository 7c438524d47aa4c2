"""One thread owns the models. Requests join the batch of their model between two tokens, and leave when they end."""

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from studio.engine.chat import TextStream
from studio.engine.generate import Decoding, Row, Sampling
from studio.engine.served import ModelPool, Ready, Weights
from studio.errors import ModelError, ServerBusyError, StudioError

GATHER_SECONDS = 0.005  # requests that come this close together are read together
MAX_ROWS = 32  # answers at a time
MAX_WAITING = 128  # requests that may wait for a place
READ_TOKENS = 256  # of newcomers' prompts between two tokens of those that are being answered
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """News for whoever asked. The last piece has a finish_reason: stop, length, cancelled or error."""

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str = ""


@dataclass(eq=False)
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

    def __init__(self, pool: ModelPool, max_waiting: int = MAX_WAITING) -> None:
        self.pool = pool
        self.max_waiting = max_waiting
        self._incoming: queue.SimpleQueue[Ask | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[Ask] = []
        self._lanes: dict[str, _Lane] = {}
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
        """Asks handed in together are read together. Raises ServerBusyError when too many wait already."""
        if self.num_waiting + len(asks) > self.max_waiting:
            raise ServerBusyError(
                f"{self.num_waiting} requests wait for an answer, more than {self.max_waiting} may not.",
                "Ask again in a moment, or ask for shorter answers.",
            )
        for ask in asks:
            self._incoming.put(ask)

    @property
    def num_waiting(self) -> int:
        """Requests that no lane has taken yet."""
        return len(self._waiting) + self._incoming.qsize()

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

    def status(self) -> dict[str, Any]:
        """What is in memory and how much there is to do; may be called from any thread."""
        lanes = list(self._lanes.values())
        return {
            "loaded": self.pool.is_loaded,
            "num_answering": sum(len(lane.asks) for lane in lanes),
            "num_waiting": self.num_waiting,
            "max_answering": MAX_ROWS,
            "max_waiting": self.max_waiting,
        }

    def remove(self, name: str) -> None:
        """Take weights out; what they are answering just now ends. On the scheduler's thread (`call`)."""
        weights = self.pool.find(name)
        self.pool.remove(name)
        for lane in self._lanes.values():
            lane.end(weights)
        self._lanes = {name: lane for name, lane in self._lanes.items() if lane.asks}

    def unload_when_idle(self) -> bool:
        """Let go of all weights when nobody waits for an answer; whether it did. On the scheduler's thread (`call`)."""
        if self._lanes or self._waiting or not self.pool.is_loaded:
            return False
        self.pool.unload()
        return True

    def _run(self) -> None:
        while not self._stopping:
            self._take_incoming()
            self._admit()
            for lane in list(self._lanes.values()):
                self._advance(lane)
        for ask in [*self._waiting, *(ask for lane in self._lanes.values() for ask in lane.asks)]:
            ask.emit(Piece(finish_reason="error", error="The model server was stopped."))

    def _take_incoming(self) -> None:
        """All that has arrived; waits for something when there is nothing to do."""
        if self._lanes or self._waiting:
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

    def _admit(self) -> None:
        """Give those that wait a place in the lane of their batch, as far as there is room."""
        room = MAX_ROWS - sum(len(lane.asks) for lane in self._lanes.values())
        self._waiting = [ask for ask in self._waiting if not _gone(ask)]
        taken, self._waiting = self._waiting[: max(0, room)], self._waiting[max(0, room) :]
        for name, asks in self._by_batch(taken).items():
            try:
                if name not in self._lanes:
                    self._lanes[name] = _Lane(self.pool.ready(asks[0].weights))
                self._lanes[name].add(asks, self.pool)
            except Exception as error:  # loading failed; others go on
                _fail(asks, error)

    def _by_batch(self, asks: Sequence[Ask]) -> dict[str, list[Ask]]:
        """Those that can be answered together; the others are told that they cannot be answered."""
        found: dict[str, list[Ask]] = {}
        there = self.pool.listed()
        for ask in asks:
            if ask.weights not in there:
                _fail([ask], _taken_out(ask.weights))
                continue
            try:
                found.setdefault(self.pool.batch_of(ask.weights), []).append(ask)
            except Exception as error:  # loading failed; others go on
                _fail([ask], error)
        return found

    def _advance(self, lane: "_Lane") -> None:
        """A fault in one lane ends its answers alone."""
        try:
            with torch.inference_mode():  # a tenth of a token's time goes into what a gradient might want to know
                lane.advance()
        except Exception as error:
            _fail(lane.asks, error)
            lane.asks = []
        self._lanes = {name: each for name, each in self._lanes.items() if each.asks}


class _Lane:
    """The answers of one model: rows that are decoded together, and newcomers whose prompts are being read.

    It lives until the last of them has ended.
    """

    def __init__(self, ready: Ready) -> None:
        self.asks: list[Ask] = []
        self._decoding = Decoding(ready.model, [], pad_id=ready.loaded.pad_id, adapters=ready.adapters)
        self._reading: deque[Decoding] = deque()
        self._answers: dict[Row, _Answer] = {}

    def add(self, asks: Sequence[Ask], pool: ModelPool) -> None:
        """Newcomers; short prompts are read together. What fails takes none of them in."""
        answers = dict(_begun(ask, pool) for ask in asks)
        ready = pool.ready(asks[0].weights)  # adapters may have come or gone since the lane began
        rows, groups = list(answers), []
        while rows:
            number = _fitting([len(row.prompt) for row in rows])
            group, rows = rows[:number], rows[number:]
            groups.append(Decoding(ready.model, group, pad_id=ready.loaded.pad_id, adapters=ready.adapters))
        self._reading.extend(groups)
        self._answers |= answers
        self.asks.extend(asks)

    def advance(self) -> None:
        """A part of the newcomers' prompts, and a token for everybody else."""
        for row, answer in self._answers.items():
            row.ended = row.ended or answer.ask.cancelled
        num_tokens = READ_TOKENS
        while self._reading and num_tokens > 0:
            num_tokens -= self._read(self._reading[0], num_tokens)
        self._pass_on(self._decoding)
        self.asks = [answer.ask for answer in self._answers.values()]

    def end(self, weights: Weights) -> None:
        """No more answers of these weights, which are gone."""
        for row, answer in list(self._answers.items()):
            if answer.ask.weights == weights:
                row.ended = True
                _fail([self._answers.pop(row).ask], _taken_out(weights))
        self.asks = [answer.ask for answer in self._answers.values()]

    def _read(self, group: Decoding, num_tokens: int) -> int:
        """Read some of a group's prompts; returns how many tokens. When all are read, it joins the others."""
        before = group.num_unread
        if not group.running or group.read(num_tokens):
            self._pass_on(group)
            self._reading.popleft()
            self._decoding.absorb(group)
        return before - group.num_unread

    def _pass_on(self, decoding: Decoding) -> None:
        """A token for each row of a batch, and the news of it for those who asked."""
        for row, token in decoding.step():
            self._answers[row].take(token)
        for row in [row for row in self._answers if row.ended]:
            self._answers.pop(row).finish()


class _Answer:
    """What a row says, as pieces of text for whoever asked."""

    def __init__(self, ask: Ask, row: Row, stream: TextStream) -> None:
        self.ask, self._row, self._stream = ask, row, stream

    def take(self, token: int | None) -> None:
        """A token of the row; a stop text ends it."""
        if token is None:
            return
        self._send(self._stream.feed(token))
        self._row.ended = self._row.ended or self._stream.stopped

    def finish(self) -> None:
        """The row has ended."""
        self._send(self._stream.finish())
        by_itself = self._row.ended_by_eos or self._stream.stopped
        reason = "cancelled" if self.ask.cancelled else "stop" if by_itself else "length"
        self.ask.emit(Piece(finish_reason=reason, num_tokens=len(self._row.answer)))

    def _send(self, text: str) -> None:
        if text:
            self.ask.emit(Piece(text))


def _begun(ask: Ask, pool: ModelPool) -> tuple[Row, _Answer]:
    loaded = pool.ready(ask.weights).loaded
    row = Row(ask.prompt, ask.sampling, frozenset(loaded.eos_ids), ask.weights.adapter)
    return row, _Answer(ask, row, TextStream(loaded, ask.stops))


def _fitting(lengths: Sequence[int]) -> int:
    """How many of the first prompts are read together: at most READ_TOKENS with padding, but at least one prompt."""
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number and longest * (number + 1) > READ_TOKENS:
            return number
    return len(lengths)


def _taken_out(weights: Weights) -> ModelError:
    return ModelError(f"{weights.name} was taken out of the server.", "Ask one that /v1/models lists.")


def _gone(ask: Ask) -> bool:
    """Whether nobody waits for this one any more; that is said."""
    if ask.cancelled:
        ask.emit(Piece(finish_reason="cancelled"))
    return ask.cancelled


def _fail(asks: Sequence[Ask], error: Exception) -> None:
    if not isinstance(error, StudioError):
        traceback.print_exception(error)
    message = str(error) if isinstance(error, StudioError) else f"{type(error).__name__}: {str(error)[:300]}"
    for ask in asks:
        ask.emit(Piece(finish_reason="error", error=message))
