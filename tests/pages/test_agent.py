"""Compare's chat with tools: leads on when nothing is loaded, shows each step as text that folds, begins anew."""

import threading
import time

import pytest

from tests.pages.model_server import ModelServer
from tests.pages.test_compare import PAGE, checkpoint, converted, server, started, words

__all__ = ["checkpoint", "converted", "server", "started"]
CALL = "Thought: <b>add</b>\nAction: Calculate\nAction Input: 17+25\n"
HOSTILE = "Final Answer: ![x](http://example.com/x.png) <b>42</b>"


@pytest.fixture
def speaks(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    """The model calls the calculator, then answers; the tool is a quick one here."""

    def events(num_columns: int):
        asked = server.asked[-1]["columns"][0]["messages"][-1]["content"]
        yield {"column": 0, "weights": "abc"}
        yield {"column": 0, "delta": HOSTILE if asked.startswith("Response:") else CALL}
        yield {"column": 0, "finish_reason": "stop", "num_tokens": 5, "seconds": 0.5}

    monkeypatch.setattr(server, "events", events)
    monkeypatch.setattr("studio.agent.tools._work_out", lambda kind, text, **_: f"<script>{text}</script>")
    return server


def ask(at, question: str):
    at.chat_input(key="agent.question").set_value(question).run()
    turns = at.session_state["kept.luna.agent.turns"]
    turns[-1].wait(20)
    time.sleep(0.05)
    at.run()
    assert not at.exception
    return turns


def test_without_a_loaded_model_it_leads_on(open_page, project) -> None:
    assert "No model is loaded yet" in words(open_page(PAGE, tab="tools"))


def test_steps_fold_and_are_text(open_page, speaks: ModelServer) -> None:
    at = open_page(PAGE, tab="tools")
    [turn] = ask(at, "17+25?")
    assert [step.tool for step in turn.steps] == ["Calculate", ""] and not turn.error
    [step] = [each for each in at.expander if "Calculate" in each.label]
    assert "17" in step.label and any(each.value == "<script>17+25</script>" for each in at.text)
    assert any(each.value == "![x](http://example.com/x.png) <b>42</b>" for each in at.text)
    sent = speaks.asked[-1]
    assert sent["columns"][0]["messages"][0]["role"] == "system" and "Response:" in sent["sampling"]["stop"]


def test_other_settings_begin_another_conversation(open_page, speaks: ModelServer) -> None:
    at = open_page(PAGE, tab="tools")
    ask(at, "17+25?")
    at.selectbox(key="agent.protocol").set_value("moss").run()
    assert at.session_state["kept.luna.agent.turns"] == [] and not at.exception
    assert "it needs a key" in words(at)


def test_stop_does_not_wait_for_the_next_piece(open_page, speaks: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    half, end = threading.Event(), threading.Event()

    def falls_silent(_num_columns: int):
        yield {"column": 0, "delta": "Thought: let me"}
        half.set()
        end.wait(60)

    at = open_page(PAGE, tab="tools")
    with monkeypatch.context() as patch:
        patch.setattr(speaks, "events", falls_silent)
        at.chat_input(key="agent.question").set_value("hi").run()
        [turn] = at.session_state["kept.luna.agent.turns"]
        assert half.wait(10) and turn.busy
        at.button(key="agent.stop").click().run()
        turn.wait(20)
        busy = turn.busy
        end.set()
    assert not busy and not turn.error
    assert (turn.steps[-1].answer, turn.steps[-1].ended_by) == ("Thought: let me", "stopped")
    at.run()
    assert [step.tool for step in ask(at, "17+25?")[-1].steps] == ["Calculate", ""]  # the line is whole again


def test_a_server_that_fails_is_said(open_page, speaks: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speaks, "events", lambda _: iter([{"column": 0, "finish_reason": "error", "error": "*no* memory"}])
    )
    at = open_page(PAGE, tab="tools")
    [turn] = ask(at, "hi")
    assert "no* memory" in turn.error
    assert at.error and "broke off" in at.error[0].value
