"""The ReAct loop: Thought, Action, Action Input, Response, Final Answer, in the words that MSAgent-Bench rows train.

The protocol's text is the one of `data.msagent`: what a model was trained with is what it is asked with.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from studio.agent.steps import Message, Step, Watch, call
from studio.agent.tools import Tool
from studio.data.msagent import PARAMETERS, PROTOCOL, TOOLS

ACTION = re.compile(r"^[ \t]*Action\s*[:\uff1a][ \t]*(?P<name>[^\n]*)", re.MULTILINE)
ACTION_INPUT = re.compile(r"^[ \t]*Action Input\s*[:\uff1a][ \t]*(?P<text>.*)", re.MULTILINE | re.DOTALL)
FINAL = re.compile(r"Final Answer\s*[:\uff1a]\s*(?P<text>.*)", re.DOTALL)
THOUGHT = re.compile(r"^\s*Thought\s*[:\uff1a]\s*")
# Colons may be Chinese ones. A model that goes on by itself would make up what the tool answers.
STOPS = ["Response:", "Response\uff1a"]


@dataclass(frozen=True)
class Move:
    """What an answer of the model asks for: a tool, or nothing more (`answer`)."""

    thought: str = ""
    tool: str = ""
    tool_input: str = ""
    answer: str = ""


def system_text(tools: Sequence[Tool], extra: str = "") -> str:
    """The system message: the tools, and how to call them; `extra` stands before it."""
    described = {
        tool.call_name: tool.description + PARAMETERS.format(parameters={tool.parameter: tool.description})
        for tool in tools
    }
    before = f"{extra.strip()}\n" if extra.strip() else ""
    return before + TOOLS.format(tools=described) + PROTOCOL.format(names=list(described))


def read_move(text: str) -> Move:
    """The next move in a model's answer; what keeps no form at all is an answer."""
    action, final = ACTION.search(text), FINAL.search(text)
    if final and not (action and action.start() < final.start()):
        return Move(_thought(text[: final.start()]), answer=final["text"].strip())
    if not action:
        return Move(answer=_thought(text))
    given = ACTION_INPUT.search(text, action.end())
    return Move(_thought(text[: action.start()]), action["name"].strip(), _input(given["text"] if given else ""))


def react(
    watch: Watch, tools: Sequence[Tool], messages: Sequence[Message], stops: Sequence[str] = ()
) -> Iterator[Step]:
    """Answer the last message, one step after the other; the last one has `ended_by` and the chat to go on with.

    `messages` begin with the `system_text`. A tool's answer is a system message, as in training.
    """
    chat = list(messages)
    for _ in range(watch.limits.max_steps):
        said = watch.say(chat, [*STOPS, *stops])
        chat.append(
            {"role": "assistant", "content": said if said.strip() else " "}
        )  # as trained, to the last line break
        if over := watch.over:
            yield Step(answer=said.strip(), ended_by=over, messages=chat)
            return
        move = read_move(said)
        if not move.tool:
            yield Step(move.thought, answer=move.answer, ended_by="answer", messages=chat)
            return
        step = call(tools, move.tool, move.tool_input, move.thought)
        chat.append({"role": "system", "content": f"Response:{step.result}\n"})
        yield step
    yield Step(ended_by="steps", messages=chat)


def _thought(text: str) -> str:
    return THOUGHT.sub("", text).strip()


def _input(text: str) -> str:
    """The one value of {"expression": "1+1"}, or the text as it is."""
    text = text.strip().strip("`").strip()
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict) and value:
            return str(next(iter(value.values())))
        return value if isinstance(value, str) else text
    return text.splitlines()[0].strip() if text else ""
