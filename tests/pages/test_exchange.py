"""Answers grow in the background, stop when asked, and end with a reason whatever happens."""

import threading
import time

import pytest

from studio.chat_client import Column, Connection, Sampling
from studio.ui.exchange import Exchange
from tests.pages.model_server import ModelServer


@pytest.fixture
def server():
    server = ModelServer(["starter", "lora-1-step_20"])
    yield server
    server.close()


def ask(connection, models=("starter", "lora-1-step_20"), on_end=lambda _replies: None):
    columns = [Column(model, [{"role": "user", "content": "Who are you?"}]) for model in models]
    return Exchange(connection, "turn-1", columns, Sampling(max_tokens=8), on_end).start()


def test_both_columns_end_with_text_weights_and_speed(server):
    kept = []
    exchange = ask(server.connection, on_end=kept.append)
    exchange.wait(10)
    for reply in exchange.replies.values():
        assert (reply.text, reply.ended_by, reply.turn_id) == ("".join(server.words), "stop", "turn-1")
        assert (reply.num_tokens, reply.seconds, reply.first_token_seconds) == (5, 0.5, 0.1)
    assert [reply.proof["weights"][:4] for reply in exchange.replies.values()] == ["0abc", "1abc"]
    assert kept == [exchange.replies]


def test_stop_keeps_what_was_said(server):
    server.word_seconds = 0.3
    exchange = ask(server.connection)
    until(lambda: exchange.replies["starter"].text)
    exchange.stop()
    exchange.wait(5)
    assert not exchange.busy
    assert {reply.ended_by for reply in exchange.replies.values()} == {"stopped"}
    assert 0 < len(exchange.replies["starter"].text) < len("".join(server.words))


def test_stop_does_not_wait_for_a_server_that_has_nothing_to_say_yet(server):
    begun, end = threading.Event(), threading.Event()

    def reads_a_long_prompt(_num_columns):
        begun.set()
        end.wait(30)
        yield from ()

    server.events = reads_a_long_prompt
    kept = []
    exchange = ask(server.connection, on_end=kept.append)
    assert begun.wait(5)
    exchange.stop()
    exchange.wait(5)
    busy = exchange.busy
    end.set()
    assert not busy
    assert [(reply.ended_by, reply.error) for reply in kept[0].values()] == [("stopped", "")] * 2


def test_stop_before_it_is_connected_ends_it_too(server):
    exchange = Exchange(server.connection, "turn-1", [Column("starter", [])], Sampling(), lambda _replies: None)
    exchange.stop()
    exchange.start().wait(5)
    assert not exchange.busy
    assert exchange.replies["starter"].ended_by == "stopped"


def test_a_server_that_is_gone_is_an_error_in_every_column():
    exchange = ask(Connection("http://127.0.0.1:9", "x"))
    exchange.wait(10)
    assert all(reply.ended_by == "error" and "does not answer" in reply.error for reply in exchange.replies.values())


def test_a_stream_that_breaks_off_is_told(server):
    server.events = lambda num_columns: iter([{"column": 0, "delta": "half"}])
    exchange = ask(server.connection)
    exchange.wait(10)
    assert exchange.replies["starter"].text == "half"
    assert "broke off" in exchange.replies["starter"].error


def until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
