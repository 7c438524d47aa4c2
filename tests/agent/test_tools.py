"""Tools as an agent calls them: in a process with limits, within sizes, search with a key alone."""

import json
import os

import httpx
import pytest

from studio.agent import tools
from studio.agent.tools import find_tool, pick_tools, search, search_is_on, tool_names
from studio.errors import StudioError, ToolError


def test_a_sum_is_worked_out_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    calculate, solve = pick_tools(["solve", "calculate"], decimals=2)
    assert calculate("1/3") == "0.33" and solve("2x=3") == "x = 3/2 ≈ 1.5"
    assert "SOME_KEY" not in tools._bare()
    with pytest.raises(ToolError, match="divides by zero"):
        calculate("1/0")


def test_the_kernel_ends_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    [solve] = pick_tools(["solve"])
    monkeypatch.setattr(tools, "WALL_SECONDS", 0.01)
    with pytest.raises(ToolError, match="more than"):
        solve("x=1")


def test_input_and_output_have_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    [calculate] = pick_tools(["calculate"])
    with pytest.raises(ToolError, match="characters"):
        calculate("1" * 2001)
    long = tools.Tool("long", "Long", "", "text", lambda text: "x" * 9999)
    assert len(long("a")) == tools.MAX_OUTPUT and long("a").endswith("…")


def test_names_that_models_write() -> None:
    there = pick_tools(["calculate", "solve"])
    assert [find_tool(there, name).name for name in ("Calculate", "calculator", "EquationSolver", "solve")] == [
        "calculate", "calculate", "solve", "solve"
    ]  # fmt: skip
    with pytest.raises(ToolError, match="There are: Calculate, Solve"):
        find_tool(there, "Python")


def test_unknown_tools_are_named() -> None:
    with pytest.raises(StudioError, match="calculate, solve, search"):
        pick_tools(["calculate", "shell"])


def test_search_is_off_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tools.SEARCH_KEY, raising=False)
    assert not search_is_on() and pick_tools(tool_names())[-1].name == "solve"
    with pytest.raises(ToolError, match=tools.SEARCH_KEY):
        search("Luna")


def test_search_asks_with_the_key_and_shortens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tools.SEARCH_KEY, "k")
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        rows = [{"title": "Luna", "snippet": "the\nmoon " + "x" * 999}, "no row", {"title": "B"}]
        return httpx.Response(200, json={"organic": rows})

    text = search("moon", httpx.MockTransport(answer))
    assert text.splitlines()[0].startswith("1. Luna: the moon xxx") and len(text.splitlines()) == 2 and len(text) < 400
    assert asked[0].headers["X-API-KEY"] == "k" and json.loads(asked[0].content) == {"q": "moon", "num": 10}
    assert pick_tools(["search"])[0].name == "search"


@pytest.mark.parametrize("answer", [httpx.Response(403), httpx.Response(200, text="no json")])
def test_a_search_that_fails_says_so_without_the_key(answer: httpx.Response, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tools.SEARCH_KEY, "top-secret")
    with pytest.raises(ToolError) as failed:
        search("moon", httpx.MockTransport(lambda _: answer))
    assert "top-secret" not in str(failed.value)


def test_a_search_without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tools.SEARCH_KEY, "k")
    for body in ({}, {"organic": []}, [1]):
        assert (
            search("x", httpx.MockTransport(lambda _, body=body: httpx.Response(200, json=body))) == "nothing was found"
        )


def test_no_key_is_in_the_environment_of_tests() -> None:
    """Whatever a test forgets, the network stays out of it."""
    assert tools.SEARCH_KEY not in os.environ
