"""MOSS' plugins: the model writes commands, reads their results in the middle of its answer, and goes on.

An answer is <|Inner Thoughts|>: …<eot>, <|Commands|>: …<eoc>, <|Results|>: …<eor>, <|MOSS|>: …<eom>, and the results
are ours. The template moss_sft goes with it.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from studio.agent.steps import Message, Step, Watch, call
from studio.agent.tools import Tool
from studio.data.phrasings import load_bank

TEMPLATE = "moss_sft"
DECIMALS = 2  # as its training data writes results
COMMANDS = re.compile(r"<\|Commands\|>\s*:(?P<text>.*?)(?:<eoc>|$)", re.DOTALL)
CALL = re.compile(r"\b(?P<name>[A-Za-z]+)\s*\(\s*(?P<quote>[\"'])(?P<text>.*?)(?P=quote)\s*\)", re.DOTALL)
THOUGHTS = re.compile(r"<\|Inner Thoughts\|>\s*:\s*(?P<text>.*?)\s*(?:<eot>|<\||$)", re.DOTALL)
ANSWER = re.compile(r"<\|MOSS\|>\s*:\s*(?P<text>.*?)\s*(?:<eom>|$)", re.DOTALL)
MAX_CALLS = 4  # in one answer
SWITCHES = {"search": "Web search", "calculate": "Calculator", "solve": "Equation solver"}


def system_text(tools: Collection[Tool], bot_name: str = "MOSS") -> str:
    """MOSS' system message, with the tools that are not there marked as disabled."""
    text = str(load_bank("templates")["systems"]["moss_sft"]).replace("{bot_name}", bot_name)
    there = {tool.name for tool in tools}
    for name, title in SWITCHES.items():
        if name not in there:
            text = re.sub(rf"(- {title}): enabled\. API: [^\n]*", r"\1: disabled.", text)
    return text


def moss(watch: Watch, tools: Sequence[Tool], messages: Sequence[Message], stops: Sequence[str] = ()) -> Iterator[Step]:
    """Answer the last message; as `react.react`."""
    chat = list(messages)
    said = watch.say(chat, ["<eoc>", "<eom>", *stops])
    if not (commands := COMMANDS.search(said)) or ANSWER.search(said) or watch.over:
        yield _last(said, watch, chat)
        return
    written, thought = [], _thoughts(said)
    for found in list(CALL.finditer(commands["text"]))[:MAX_CALLS]:
        step = call(tools, found["name"], found["text"], thought)
        written.append(f'{found["name"]}("{found["text"]}") => {step.result}')
        yield step
        thought = ""
    results = "\n" + "\n".join(written) if written else " None"
    said = f"{said.rstrip()}<eoc>\n<|Results|>:{results}<eor>\n"
    rest = watch.say([*chat, {"role": "assistant", "content": said}], ["<eom>", *stops])
    yield _last(said + rest, watch, chat, thought)


def _last(said: str, watch: Watch, chat: list[Message], thought: str = "") -> Step:
    found = ANSWER.search(said)
    plain = said.rpartition("<eor>")[2].strip()
    chat = [*chat, {"role": "assistant", "content": f"{said.strip() or ' '}<eom>\n"}]
    return Step(thought, answer=found["text"] if found else plain, ended_by=watch.over or "answer", messages=chat)


def _thoughts(said: str) -> str:
    found = THOUGHTS.search(said)
    return found["text"] if found and found["text"] != "None" else ""
