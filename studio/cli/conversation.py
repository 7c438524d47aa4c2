"""A conversation in the shell: questions of several lines, one or more models that answer, or an agent with tools."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from studio.cli import show
from studio.cli.lazy import agent_session, chat_client, phrasings, tools
from studio.errors import ChatTooLongError, StudioError

if TYPE_CHECKING:
    from studio.agent.steps import Limits, Message, Step
    from studio.chat_client import Connection, Sampling

RESET, EXIT = "RESET", "EXIT"
HINT = "An empty line sends what you wrote. RESET forgets the conversation, EXIT leaves."


class Partner(Protocol):
    """Whoever answers; it keeps the conversation so far."""

    def ask(self, question: str) -> None: ...

    def reset(self) -> None: ...


def hold(partner: Partner, prompt: str = "") -> None:
    """Ask `prompt` alone, or whatever is typed until EXIT, Ctrl-C or the end of the input."""
    if prompt:
        return _ask(partner, prompt)
    is_typed = sys.stdin.isatty()  # else they come from a pipe, which wants no hints, and its questions shown
    if is_typed:
        show.say(HINT)
    try:
        for question in _questions(is_typed):
            if question == RESET:
                partner.reset()
                show.say("The conversation begins anew.")
            else:
                if not is_typed:
                    show.say(f"you {question}")
                _ask(partner, question)
    except KeyboardInterrupt:
        show.say("")
    return None


def _questions(is_typed: bool) -> Iterator[str]:
    """What is typed: RESET at once, other texts when an empty line ends them; EXIT or the end of input ends it."""
    lines: list[str] = []
    while True:
        try:
            line = (show.out.input("[bold]you[/bold] " if not lines else "    ") if is_typed else input()).rstrip()
        except EOFError:
            line = EXIT if not lines else ""
        if not lines and line == EXIT:
            return
        if not lines and line == RESET:
            yield RESET
        elif line:
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _ask(partner: Partner, question: str) -> None:
    """A chat that has become too long for the model is forgotten, which is said, and the question asked anew."""
    try:
        partner.ask(question)
    except ChatTooLongError:
        show.warn("The conversation has become too long for the model; it was forgotten.")
        partner.reset()
        partner.ask(question)


def system_of(name: str, bot_name: str) -> str:
    """The system text of a name, with the assistant's name in its place; "" for no name. Raises StudioError."""
    systems = phrasings.load_bank("templates")["systems"]
    if name and name not in systems:
        raise StudioError(f"There is no system template {name!r}.", f"Allowed: {', '.join(systems)}.")
    return str(systems[name]).replace("{bot_name}", bot_name) if name else ""


def tools_of(names: str) -> list[str]:
    """Tools that can run, by names with commas or blanks between them; all of these when there is none.

    Search that was asked for and has no key is left out, which is said. Raises StudioError when no tool is left.
    """
    wanted = names.replace(",", " ").split()
    found = [tool.name for tool in tools.pick_tools(wanted or tools.tool_names())]
    if "search" in wanted and not tools.search_is_on():
        show.warn(f"Search is off: there is no {tools.SEARCH_KEY} in the environment.")
    if not found:
        raise StudioError("No tool is left to call.", f"Allowed: {', '.join(tools.tool_names())}.")
    return found


class SideBySide:
    """All models answer at once. One alone is shown while it speaks, several when each is complete."""

    def __init__(
        self, connection: Connection, models: Sequence[str], sampling: Sampling, system: str = "", streams: bool = True
    ) -> None:
        self._connection, self._sampling, self._system = connection, sampling, system
        self._streams = streams and len(models) == 1
        self._models = list(models)
        self.reset()

    def reset(self) -> None:
        begin = [{"role": "system", "content": self._system}] if self._system else []
        self._histories: dict[str, list[dict[str, str]]] = {model: list(begin) for model in self._models}

    def ask(self, question: str) -> None:
        asked = {"role": "user", "content": question}
        columns = [chat_client.Column(model, [*chat, asked]) for model, chat in self._histories.items()]
        answers, weights = [""] * len(columns), [""] * len(columns)
        with closing(chat_client.stream_compare(self._connection, columns, self._sampling)) as events:
            for event in events:
                answers[event.column] += event.delta
                weights[event.column] = event.weights or weights[event.column]
                if self._streams:
                    self._show_piece(columns[0].model, event.weights, event.delta)
                if event.finish_reason:
                    model, answer = columns[event.column].model, answers[event.column]
                    self._histories[model] += [asked, {"role": "assistant", "content": answer or " "}]
                    self._show_end(model, weights[event.column], answer, event.error)

    def _show_piece(self, model: str, weights: str, delta: str) -> None:
        if weights:
            _head(model, weights)
        show.out.print(show.plain(delta), end="", highlight=False)

    def _show_end(self, model: str, weights: str, answer: str, error: str) -> None:
        if not self._streams:
            _head(model, weights)
            answer = f"  {answer}"
        show.say(error or ("" if self._streams else answer))


class Agent:
    """One model that calls tools. Its words are shown while it speaks, what a tool gave as soon as it is there."""

    def __init__(
        self,
        connection: Connection,
        model: str,
        sampling: Sampling,
        tools_there: Sequence[str],
        protocol: str,
        *,
        limits: Limits | None = None,
        **session: str,
    ) -> None:
        self._connection, self._model, self._sampling = connection, model, sampling
        self._session = agent_session.Session(self._say, tools_there, protocol, limits=limits, **session)

    def reset(self) -> None:
        self._session.reset()

    def ask(self, question: str) -> None:
        for step in self._session.answer(question, self._sampling.stop):
            _show_outcome(step)

    def _say(self, messages: list[Message], stops: list[str]) -> Generator[str, None, None]:
        sampling = replace(self._sampling, stop=tuple(stops))
        spoke = False
        with closing(chat_client.stream_chat(self._connection, self._model, messages, sampling)) as pieces:
            try:
                for piece in show.waiting(pieces, f"{self._model} is at it …"):
                    show.out.print(show.plain(piece), end="", highlight=False)
                    spoke = spoke or bool(piece)
                    yield piece
            finally:
                if spoke:
                    show.say("")


def _head(model: str, weights: str) -> None:
    show.out.print(show.plain(f"{model}  weights {weights[:12]}"), style="bold", highlight=False)


def _show_outcome(step: Step) -> None:
    """What came of the words that were shown: what a tool gave, or why there is no answer."""
    if step.tool:
        label = f"{step.tool} failed:" if step.failed else f"{step.tool} gave:"
        show.out.print(show.plain(f"{label} {step.result}"), style="cyan", highlight=False)
    if step.ended_by == "answer" and not step.answer:
        show.say("(it said nothing)")
    if step.ended_by in ("steps", "time"):
        show.warn(f"It ended without an answer: the limit of {step.ended_by} was reached.")
