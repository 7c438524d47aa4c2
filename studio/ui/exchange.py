"""One question to several models, answered in a thread of its own: reruns of the page read what is there so far."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from studio.chat_client import Column, Connection, Event, Sampling, stream_compare
from studio.errors import StudioError

Messages = list[dict[str, str]]


@dataclass
class Answer:
    """What one model has said so far. `ended_by` is empty while it speaks, then stop, length, stopped or error."""

    text: str = ""
    ended_by: str = ""
    error: str = ""
    weights: str = ""
    tokens_per_second: float = 0.0


class Exchange:
    """A question and the answers to it, by model. Its thread writes, pages read; what is there only grows."""

    def __init__(
        self, connection: Connection, chats: Mapping[str, Messages], question: str, sampling: Sampling
    ) -> None:
        self.question = question
        self.answers = {model: Answer() for model in chats}
        self._connection = connection
        self._columns = [Column(model, messages) for model, messages in chats.items()]
        self._sampling = sampling
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="exchange")

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> "Exchange":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask the models to stop; what was said so far stays."""
        self._stop.set()

    def wait(self, timeout_seconds: float) -> None:
        """Block until all answers have ended, or the time is over."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            with closing(stream_compare(self._connection, self._columns, self._sampling)) as events:
                for event in events:
                    if self._stop.is_set():
                        return self._end_all("stopped")
                    self._apply(event)
        except StudioError as error:
            self._end_all("error", str(error))
        finally:
            self._end_all("error", "The answer broke off.")

    def _apply(self, event: Event) -> None:
        answer = self.answers[self._columns[event.column].model]
        answer.text += event.delta
        answer.weights = event.weights or answer.weights
        if event.finish_reason:
            answer.error = event.error
            answer.tokens_per_second = event.num_tokens / event.seconds if event.seconds else 0.0
            answer.ended_by = event.finish_reason

    def _end_all(self, ended_by: str, error: str = "") -> None:
        """End the answers that have not ended by themselves."""
        for answer in self.answers.values():
            if not answer.ended_by:
                answer.error, answer.ended_by = error, ended_by


def chat_so_far(turns: Sequence[Exchange], model: str, system: str, question: str) -> Messages:
    """The messages that a model continues: its own answers of the turns before, then the new question."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns:
        answer = turn.answers.get(model)
        if answer and answer.text:
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": answer.text},
            ]
    return [*messages, {"role": "user", "content": question}]
