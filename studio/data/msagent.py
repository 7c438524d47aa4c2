"""MSAgent-Bench rows as turns of the ReAct protocol, as XTuner 0.1.23's map msagent_react writes them."""

import ast
import json
import re
from typing import Any

from studio.data.rows import BadRow, kind_of

MAX_TEXT = 8 * 2**20
THINK, THINK_END = "<|startofthink|>", "<|endofthink|>"
EXEC, EXEC_END = "<|startofexec|>", "<|endofexec|>"
FINAL = "Final Answer:"
# The protocol's words are XTuner's (Apache License 2.0, Copyright (c) OpenMMLab): models trained there answer to them.
TOOLS = "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{tools}\n"
PROTOCOL = (
    "如果使用工具请遵循以下格式回复：\n```\nThought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\nAction Input:工具输入参数\n```\n"
    "工具返回按照以下格式回复：\n```\nResponse:调用工具后的结果\n```\n"
    "如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)
PARAMETERS = "\n输入参数: {parameters}"
DECODER = json.JSONDecoder()
OPENING = re.compile(r"\{(?=\s*[\"}])")
MAX_TRIES = 1000


def react_turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Turns of a row; none where XTuner leaves it out (too short, or a call that is no JSON). Raises BadRow."""
    turns: list[dict[str, Any]] = []
    system = question = ""
    messages = _messages(row)
    for speaker, text in messages if len(messages) > 1 else []:
        if speaker == "system":
            system += _tools(text)
        elif speaker == "user":
            question += f"{text}\n"
        elif speaker == "assistant":
            try:
                answer, response = _answer(text)
            except (ValueError, KeyError, TypeError, RecursionError):
                return []
            turns.append({"system": system, "input": question, "output": answer})
            turns += _after_tool(response)
            system = question = ""
    return turns


def _messages(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(speaker, text) from a list, or its notation in Python or JSON as text; nothing in it runs."""
    value = row.get("conversations")
    if isinstance(value, str):
        value = _literal(value)
    if not isinstance(value, list):
        raise BadRow(f'"conversations" must be a list, not {kind_of(value)}.')
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("from", "value")):
            raise BadRow('each message must have text under "from" and "value".')
    return [(message["from"], message["value"]) for message in value]


def _literal(text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise BadRow(f'"conversations" is a text of {len(text)} characters; at most {MAX_TEXT} are read as a list.')
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise BadRow('"conversations" is text, and no list in the notation of Python or JSON.')


def _tools(text: str) -> str:
    """The system text: tools with their parameters, and how to call them."""
    tools: dict[str, Any] = {}
    for tool in _objects(text):
        if not isinstance(tool["name"], str):
            raise BadRow(f"the name of a tool must be text, not {kind_of(tool['name'])}.")
        tools[tool["name"]] = tool["description"]
        try:
            parameters = {each["name"]: each["description"] for each in tool["paths"][0]["parameters"]}
            tools[tool["name"]] += PARAMETERS.format(parameters=parameters)
        except (LookupError, TypeError):
            continue  # a tool without parameters
    return TOOLS.format(tools=tools) + PROTOCOL.format(names=list(tools))


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects in a text that have a name and a description; inner ones where the outer one has not.

    Gives up after MAX_TRIES beginnings that are no object: each costs a look at all of the text before it.
    """
    found, tries, opening = [], 0, OPENING.search(text)
    while opening and tries < MAX_TRIES:
        try:
            value, end = DECODER.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            value, end, tries = {}, opening.end(), tries + 1
        if "name" in value and "description" in value:
            found.append(value)
        else:
            end = opening.start() + 1
        opening = OPENING.search(text, end)
    return found


def _answer(text: str) -> tuple[str, str]:
    """(answer in the protocol's words, what the tool gave and what followed). Raises ValueError or KeyError."""
    response = ""
    if EXEC in text:
        text, rest = text.split(EXEC)  # ValueError: more than one
        response = EXEC + rest
    thought, num_calls = "", 0
    while (start := text.find(THINK)) >= 0 and (end := text.find(THINK_END, start + len(THINK))) >= 0:
        thought += _call(text[:start], text[start + len(THINK) : end])
        text = text[end + len(THINK_END) :]
        num_calls += 1
    return (f"{thought}{text}\n" if num_calls else f"{FINAL}{text}\n"), response


def _call(thought: str, call: str) -> str:
    said = f"Thought:{thought.strip()}\n" if thought.strip() else ""
    value = json.loads(_bare(call))
    return f"{said}Action:{value['api_name']}\nAction Input:{value['parameters']}\n"


def _bare(code: str) -> str:
    return code.replace("```JSON", "").replace("```", "").replace("\n", "")


def _after_tool(response: str) -> list[dict[str, Any]]:
    """The turn after a tool's answer, which stands as its system text; none without a final answer."""
    end = response.find(EXEC_END)
    if end >= 0:
        try:
            result = json.loads(_bare(response[len(EXEC) : end]))
        except (ValueError, RecursionError):
            return []
        rest = response[end + len(EXEC_END) :]
        final = f"{FINAL}{rest.strip()}\n" if rest.strip() else ""
        response = f"Response:{result}\n{final}" + "\n" * rest.endswith("\n")
    before, *after = response.split(FINAL)
    return [{"system": before, "output": FINAL + after[0]}] if len(after) == 1 else []
