"""Answers grow in the background, stop when asked, and end with a reason whatever happens."""

import time

import pytest

from studio.chat_client import Connection, Sampling
from studio.ui.exchange import Exchange, chat_so_far
from tests.pages.model_server import ModelServer


@pytest.fixture
def server():
    server = ModelServer(["starter", "lora-1-step_20"])
    yield server
    server.close()


def ask(connection, models=("starter", "lora-1-step_20"), question="Who are you?", turns=()):
    chats = {model: chat_so_far(turns, model, "", question) for model in models}
    return Exchange(connection, chats, question, Sampling(max_tokens=8)).start()


def test_both_columns_end_with_text_weights_and_speed(server):
    exchange = ask(server.connection)
    exchange.wait(10)
    for answer in exchange.answers.values():
        assert (answer.text, answer.ended_by) == ("".join(server.words), "stop")
        assert answer.tokens_per_second == pytest.approx(10)
    assert [answer.weights[:4] for answer in exchange.answers.values()] == ["0abc", "1abc"]


def test_stop_keeps_what_was_said(server):
    server.word_seconds = 0.3
    exchange = ask(server.connection)
    until(lambda: exchange.answers["starter"].text)
    exchange.stop()
    exchange.wait(5)
    assert not exchange.busy
    assert {answer.ended_by for answer in exchange.answers.values()} == {"stopped"}
    assert 0 < len(exchange.answers["starter"].text) < len("".join(server.words))


def test_a_server_that_is_gone_is_an_error_in_every_column():
    exchange = ask(Connection("http://127.0.0.1:9", "x"))
    exchange.wait(10)
    assert all(answer.ended_by == "error" and "does not answer" in answer.error for answer in exchange.answers.values())


def test_a_stream_that_breaks_off_is_told(server):
    server.events = lambda num_columns: iter([{"column": 0, "delta": "half"}])
    exchange = ask(server.connection)
    exchange.wait(10)
    assert exchange.answers["starter"].text == "half"
    assert "broke off" in exchange.answers["starter"].error


def test_each_model_continues_its_own_chat(server):
    first = ask(server.connection)
    first.wait(10)
    first.answers["starter"].text = "I am SmolLM."
    messages = chat_so_far([first], "starter", " Be brief. ", "And now?")
    assert [message["content"] for message in messages] == ["Be brief.", "Who are you?", "I am SmolLM.", "And now?"]
    assert chat_so_far([first], "another", "", "And now?") == [{"role": "user", "content": "And now?"}]


def until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
