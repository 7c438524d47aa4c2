"""One question to an agent, worked on in a thread of its own: reruns of the page read the steps so far."""

import threading

from studio.agent.session import Session
from studio.agent.steps import Step
from studio.chat_client import Line
from studio.errors import StudioError


class AgentTurn:
    """A question and what the agent did. Its thread writes, pages read; `steps` only grows."""

    def __init__(self, session: Session, question: str, line: Line) -> None:
        """The session asks its model over the `line`, one turn after the other."""
        self.question = question
        self.steps: list[Step] = []
        self.error = ""
        self._session, self._line = session, line
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="agent")

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> "AgentTurn":
        self._line.mend()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop the agent now, also while its model reads or waits; what it did so far stays. A tool is not broken
        off: the agent ends when the tool has."""
        self._stop.set()
        self._line.cut()

    def wait(self, timeout_seconds: float) -> None:
        """Block until it has ended, or the time is over."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            for step in self._session.answer(self.question, stopped=self._stop.is_set):
                self.steps.append(step)
        except StudioError as error:
            self.error = str(error)
