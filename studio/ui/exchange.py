"""One question to several columns, answered in a thread of its own: reruns of the page read what is there so far."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from studio.chat_client import Column, Connection, Event, Line, Sampling, stream_compare
from studio.chats import Reply
from studio.errors import StudioError

OnEnd = Callable[[Mapping[str, Reply]], None]


class Exchange:
    """The replies to one turn, by model. Its thread writes, pages read; what is there only grows.

    `on_end` gets the replies when all have ended, however they did: also when nobody looks at the page any more.
    """

    def __init__(
        self, connection: Connection, turn_id: str, columns: Sequence[Column], sampling: Sampling, on_end: OnEnd
    ) -> None:
        self.turn_id = turn_id
        self.replies = {column.model: Reply(turn_id, column.model) for column in columns}
        self._connection, self._columns, self._sampling = connection, list(columns), sampling
        self._on_end = on_end
        self._stop, self._line = threading.Event(), Line()
        self._thread = threading.Thread(target=self._run, daemon=True, name="exchange")

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> "Exchange":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop the models now, also those that still read or wait; what was said so far stays."""
        self._stop.set()
        self._line.cut()

    def wait(self, timeout_seconds: float) -> None:
        """Block until all replies have ended, or the time is over."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        problem = "The answer broke off."
        try:
            self._listen()
        except StudioError as error:
            problem = str(error)
        finally:
            self._end_all(problem)
            self._on_end(self.replies)

    def _listen(self) -> None:
        with closing(stream_compare(self._connection, self._columns, self._sampling, self._line)) as events:
            for event in events:
                if self._stop.is_set():
                    return
                self._apply(event)

    def _apply(self, event: Event) -> None:
        reply = self.replies[self._columns[event.column].model]
        reply.text += event.delta
        reply.proof = event.proof or reply.proof
        if event.finish_reason:
            reply.error, reply.num_tokens = event.error, event.num_tokens
            reply.seconds, reply.first_token_seconds = event.seconds, event.first_token_seconds
            reply.ended_by = event.finish_reason

    def _end_all(self, problem: str) -> None:
        """End the replies that have not ended by themselves: stopped if that was asked for, else with the problem."""
        ended_by, error = ("stopped", "") if self._stop.is_set() else ("error", problem)
        for reply in self.replies.values():
            if not reply.ended_by:
                reply.error, reply.ended_by = error, ended_by
