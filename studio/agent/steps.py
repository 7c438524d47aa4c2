"""What an agent does, step by step, and the limits that end it."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from studio.agent.tools import Tool, find_tool
from studio.errors import ServerError, ToolError

Message = dict[str, str]
# Messages and stop texts in, pieces of the answer out; an assistant's message at the end is continued.
# Closing the iterator ends the answer.
Ask = Callable[[list[Message], list[str]], Generator[str, None, None]]
EndedBy = Literal["", "answer", "steps", "time", "stopped"]


@dataclass(frozen=True)
class Limits:
    """When an agent has to come to an end."""

    max_steps: int = 6
    max_seconds: float = 120.0
    max_characters: int = 8000  # of one answer of the model


@dataclass(frozen=True)
class Step:
    """One thing that happened: a call of a tool with what came back, or the last word (`answer`).

    `thought` is what the model said before. `failed`: `result` says why the tool gave nothing.
    `ended_by` is empty for a call; else "answer", or the limit that was reached.
    """

    thought: str = ""
    tool: str = ""
    tool_input: str = ""
    result: str = ""
    failed: bool = False
    answer: str = ""
    ended_by: EndedBy = ""
    messages: list[Message] = field(default_factory=list)  # of the last step: the chat to go on with


class Watch:
    """Asks the model within the limits of one question."""

    def __init__(self, ask: Ask, limits: Limits | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        self.limits = limits or Limits()
        self._ask = ask
        self._stopped = stopped
        self._deadline = time.monotonic() + self.limits.max_seconds

    @property
    def over(self) -> EndedBy:
        """Why there is no more to be done; empty while there may be."""
        return "stopped" if self._stopped() else "time" if time.monotonic() > self._deadline else ""

    def say(self, messages: list[Message], stops: list[str]) -> str:
        """What the model says next, as far as the limits let it. Raises ServerError, unless it was stopped by then."""
        text = ""
        try:
            with closing(self._ask(messages, stops)) as pieces:
                for piece in pieces:
                    text += piece
                    if self.over or len(text) > self.limits.max_characters:
                        break
        except ServerError:
            if not self._stopped():  # who stops an agent may cut its line to the model
                raise
        return text[: self.limits.max_characters]


def call(tools: Sequence[Tool], called: str, tool_input: str, thought: str) -> Step:
    """The step in which the model calls a tool; a failure is told to the model, which may try again."""
    try:
        return Step(thought, called, tool_input, find_tool(tools, called)(tool_input))
    except ToolError as error:
        return Step(thought, called, tool_input, str(error), failed=True)
