"""Conversations in the shell with models that speak from a list: what is typed, what is shown, what goes on."""

import io
from collections.abc import Iterator, Sequence

import pytest

from studio.agent.steps import Limits
from studio.agent.tools import Tool
from studio.chat_client import Column, Connection, Event, Sampling
from studio.cli import conversation
from studio.cli.conversation import Agent, SideBySide
from studio.errors import ChatTooLongError

HOSTILE = Tool("calculate", "Calculate", "", "expression", lambda text: "\x1b[31m[red]<script>alert(1)</script>")


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, str]], Sampling]]:
    """What the model was asked; it calls the tool, then answers."""
    asked: list[tuple[list[dict[str, str]], Sampling]] = []

    def stream_chat(_: Connection, __: str, messages: list[dict[str, str]], sampling: Sampling) -> Iterator[str]:
        asked.append((list(messages), sampling))
        if "Response:" in messages[-1]["content"]:
            yield from ("Final ", "Answer: 2")
        else:
            yield from ("Thought: hm\n", "Action: Calculate\nAction Input: 1")

    monkeypatch.setattr(conversation.chat_client, "stream_chat", stream_chat, raising=False)
    monkeypatch.setattr("studio.agent.session.pick_tools", lambda names, decimals: [HOSTILE])
    return asked


def test_steps_are_shown_as_text(speaks: list, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(Connection("", ""), "tuned", Sampling(9, stop=("END",)), ["calculate"], "react", system="Be brief.")
    conversation.hold(agent, "1+1?")
    seen = capsys.readouterr()
    said = seen.out
    assert not seen.err  # a pipe is shown no waiting
    assert said.startswith("Thought: hm\nAction: Calculate\nAction Input: 1\nCalculate gave: ")
    assert said.endswith("\nFinal Answer: 2\n")
    assert "[red]<script>alert(1)</script>" in said and "\x1b" not in said
    assert speaks[0][0][0]["content"].startswith("Be brief.\n") and "END" in speaks[0][1].stop


def test_words_are_shown_while_the_model_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stream_chat(*_: object) -> Iterator[str]:
        for piece in ("Final ", "Answer: ", "2"):
            yield piece
            seen.append(capsys.readouterr().out)  # when it is asked for the next piece

    monkeypatch.setattr(conversation.chat_client, "stream_chat", stream_chat, raising=False)
    Agent(Connection("", ""), "tuned", Sampling(9), ["calculate"], "react").ask("1+1?")
    assert seen == ["Final ", "Answer: ", "2"]


def test_the_conversation_goes_on_and_begins_anew(speaks: list) -> None:
    agent = Agent(Connection("", ""), "tuned", Sampling(9), ["calculate"], "react")
    agent.ask("one")
    agent.ask("two")
    assert [message["role"] for message in speaks[2][0]] == [
        "system",
        "user",
        "assistant",
        "system",
        "assistant",
        "user",
    ]
    agent.reset()
    agent.ask("three")
    assert len(speaks[-2][0]) == 2


def test_a_limit_that_was_reached_is_said(speaks: list, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(Connection("", ""), "tuned", Sampling(9), ["calculate"], "react", limits=Limits(1, 60))
    agent.ask("one")
    assert "limit of steps" in capsys.readouterr().err


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[Column]]:
    """Both models say what they were asked last; chats of more than four messages are too long."""
    asked: list[list[Column]] = []

    def stream_compare(_: Connection, columns: Sequence[Column], __: Sampling) -> Iterator[Event]:
        if len(columns[0].messages) > 4:
            raise ChatTooLongError("too long")
        asked.append(list(columns))
        for number, column in enumerate(columns):
            yield Event(number, weights="ab" * 32)
            yield Event(number, delta=f"{column.model}: {column.messages[-1]['content']}")
            yield Event(number, finish_reason="stop")

    monkeypatch.setattr(conversation.chat_client, "stream_compare", stream_compare, raising=False)
    return asked


def hold(monkeypatch: pytest.MonkeyPatch, typed: str, models: Sequence[str] = ("base",), system: str = "") -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    conversation.hold(SideBySide(Connection("", ""), models, Sampling(9), system))


def test_an_empty_line_sends_several_lines(
    answers: list[list[Column]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(monkeypatch, "\n\nWho are\nyou?\n\nAnd you?\n\nRESET\n\nAgain?\n\nEXIT\nnever asked\n\n", system="Be brief.")
    assert [[message["content"] for message in columns[0].messages] for columns in answers] == [
        ["Be brief.", "Who are\nyou?"],
        ["Be brief.", "Who are\nyou?", "base: Who are\nyou?", "And you?"],
        ["Be brief.", "Again?"],
    ]
    said = capsys.readouterr().out
    assert "begins anew" in said and said.count("weights abababababab") == 3 and "base: And you?" in said
    assert "you Who are\nyou?\n" in said and "\nyou Again?\n" in said  # what a pipe asked stands beside the answers
    assert conversation.HINT not in said


def test_a_terminal_is_asked_and_told_how(
    answers: list[list[Column]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("Who?\n\nEXIT\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    conversation.hold(SideBySide(Connection("", ""), ["base"], Sampling(9)))
    said = capsys.readouterr().out
    assert said.startswith(conversation.HINT) and "\nyou     base  weights" in said and said.endswith("you ")


def test_the_end_of_the_input_sends_and_leaves(answers: list[list[Column]], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, "Who are you?", models=("base", "tuned"))
    assert [column.model for column in answers[0]] == ["base", "tuned"] and len(answers) == 1


def test_a_chat_that_is_too_long_is_forgotten(
    answers: list[list[Column]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(monkeypatch, "one\n\ntwo\n\nthree\n\n")
    assert [len(columns[0].messages) for columns in answers] == [1, 3, 1]
    assert "it was forgotten" in capsys.readouterr().err
