"""The tools that an agent may call: calculate, solve and search. Each takes one text and gives one, of bounded size."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from studio.agent import arithmetic
from studio.errors import StudioError, ToolError

MAX_INPUT = 2000  # characters
MAX_OUTPUT = 2000
WALL_SECONDS = 20  # for a sum; its own limit counts processor time only
SEARCH_KEY = "SERPER_API_KEY"  # serper.dev, as XTuner has it
SEARCH_URL = "https://google.serper.dev/search"
NUM_RESULTS = 10
SEARCH_SECONDS = 10


@dataclass(frozen=True)
class Tool:
    """`name` is what a person switches on, `call_name` what a model calls; `run` raises ToolError."""

    name: str
    call_name: str
    description: str
    parameter: str
    run: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """The tool's answer to a text, cut at MAX_OUTPUT characters. Raises ToolError."""
        if len(text) > MAX_INPUT:
            raise ToolError(f"The input has {len(text):,} characters; {MAX_INPUT:,} are allowed.")
        answer = self.run(text)
        return answer if len(answer) <= MAX_OUTPUT else answer[: MAX_OUTPUT - 1] + "…"


def tool_names() -> list[str]:
    """What may be switched on, whether or not it can run here."""
    return list(_KNOWN)


def search_is_on() -> bool:
    """Whether the environment has a key for the search."""
    return bool(os.environ.get(SEARCH_KEY, "").strip())


def pick_tools(names: Collection[str], decimals: int | None = None) -> list[Tool]:
    """The tools of these names that can run here: search is left out without a key. Raises StudioError.

    `decimals`: places of the calculator's results; as many as they need when None.
    """
    if unknown := sorted(set(names) - set(_KNOWN)):
        raise StudioError(f"There is no tool {unknown[0]!r}.", f"Allowed: {', '.join(_KNOWN)}.")
    made = [_KNOWN[name](decimals) for name in _KNOWN if name in names]
    return [tool for tool in made if tool.name != "search" or search_is_on()]


def find_tool(tools: Sequence[Tool], called: str) -> Tool:
    """The tool that a model means: Calculator and GoogleSearch are known as well. Raises ToolError."""
    wanted = called.lower()
    for tool in tools:
        if tool.name.removesuffix("e") in wanted:
            return tool
    raise ToolError(f"There is no tool {called[:60]!r}. There are: {', '.join(each.call_name for each in tools)}.")


def _calculator(decimals: int | None) -> Tool:
    run = partial(_work_out, "calculate", decimals=decimals)
    return Tool("calculate", "Calculate", "Works out an arithmetic expression.", "expression", run)


def _solver(_: int | None) -> Tool:
    run = partial(_work_out, "solve")
    return Tool("solve", "Solve", "Solves equations; several are written with a ; between them.", "equation", run)


def _searcher(_: int | None) -> Tool:
    return Tool("search", "Search", "Searches the web and gives the first results.", "query", search)


_KNOWN: dict[str, Callable[[int | None], Tool]] = {
    "calculate": _calculator, "solve": _solver, "search": _searcher,
}  # fmt: skip


def _work_out(kind: str, text: str, **options: Any) -> str:
    """Ask the process of arithmetic.py, which the kernel ends when a sum takes too long."""
    request = json.dumps({"tool": kind, "text": text} | options)
    command = [sys.executable, "-P", str(Path(arithmetic.__file__))]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=WALL_SECONDS, check=False, env=_bare()
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"It takes more than {arithmetic.MAX_SECONDS} seconds.") from None
    if done.returncode or not done.stdout:
        raise ToolError(f"It takes more than {arithmetic.MAX_SECONDS} seconds or too much memory.")
    answer: dict[str, str] = json.loads(done.stdout)
    if "error" in answer:
        raise ToolError(f"It cannot be worked out: {answer['error']}.")
    return answer["result"]


def _bare() -> dict[str, str]:
    """An environment without keys."""
    return {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "SYSTEMROOT")}


def search(query: str, transport: httpx.BaseTransport | None = None) -> str:
    """The first results of a web search as numbered lines, through serper.dev. Raises ToolError."""
    key = os.environ.get(SEARCH_KEY, "").strip()
    if not key:
        raise ToolError(f"Search is off: there is no {SEARCH_KEY} in the environment.")
    try:
        with httpx.Client(timeout=SEARCH_SECONDS, transport=transport) as client:
            body = {"q": query, "num": NUM_RESULTS}
            response = client.post(SEARCH_URL, json=body, headers={"X-API-KEY": key})
            response.raise_for_status()
            found = response.json()
    except httpx.HTTPStatusError as error:
        raise ToolError(f"The search answered with status {error.response.status_code}.") from None
    except (httpx.HTTPError, ValueError) as error:  # the text of an httpx error may hold the address, never the key
        raise ToolError(f"The search did not answer ({type(error).__name__}).") from None
    return _results(found)


def _results(found: Any) -> str:
    rows = found.get("organic") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        return "nothing was found"
    texts = [f"{row.get('title', '')}: {row.get('snippet', '')}" for row in rows if isinstance(row, dict)]
    return "\n".join(f"{number}. {' '.join(text.split())[:300]}" for number, text in enumerate(texts[:NUM_RESULTS], 1))
