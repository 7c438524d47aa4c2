"""One question to an agent, worked on in a thread of its own: reruns of the page read the steps so far."""

import threading

from studio.agent.session import Session
from studio.agent.steps import Step
from studio.errors import StudioError


class AgentTurn:
    """A question and what the agent did. Its thread writes, pages read; `steps` only grows."""

    def __init__(self, session: Session, question: str) -> None:
        self.question = question
        self.steps: list[Step] = []
        self.error = ""
        self._session = session
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="agent")

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> "AgentTurn":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask the agent to stop; what it did so far stays."""
        self._stop.set()

    def wait(self, timeout_seconds: float) -> None:
        """Block until it has ended, or the time is over."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            for step in self._session.answer(self.question, stopped=self._stop.is_set):
                self.steps.append(step)
        except StudioError as error:
            self.error = str(error)
