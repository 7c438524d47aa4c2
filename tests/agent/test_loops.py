"""The two loops with a model that speaks from a list: what it is asked, what is run, and that every loop ends."""

from collections.abc import Iterator

import pytest

from studio.agent.moss import moss
from studio.agent.moss import system_text as moss_system
from studio.agent.react import react, read_move, system_text
from studio.agent.steps import Limits, Message, Watch
from studio.agent.tools import Tool
from studio.data.msagent import react_turns
from studio.errors import ToolError


def _sum(text: str) -> str:
    if "+" not in text:
        raise ToolError("It cannot be worked out.")
    return str(sum(map(int, text.split("+"))))


TOOLS = [
    Tool("calculate", "Calculate", "Works out.", "expression", _sum),
    Tool("solve", "Solve", "Solves.", "equation", lambda text: f"solved {text}"),
]
ASKED: list[Message] = [{"role": "system", "content": "tools"}, {"role": "user", "content": "17+25?"}]


class Model:
    """Says one text after the other, letter by letter, up to a stop text; remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.letters = list(texts), [], 0

    def __call__(self, messages: list[Message], stops: list[str]) -> Iterator[str]:
        self.asked.append([dict(message) for message in messages])
        text = self.texts.pop(0)
        for stop in stops:
            text = text.partition(stop)[0]
        for letter in text:
            self.letters += 1
            yield letter


def test_react_runs_the_tool_and_answers() -> None:
    model = Model(
        "Thought: add them\nAction: Calculate\nAction Input: {'expression': '17+25'}\nResponse: 99\nFinal Answer: 99",
        "Thought: done\nFinal Answer: It is 42.",
    )
    call, last = react(Watch(model), TOOLS, ASKED)
    assert (call.thought, call.tool, call.tool_input, call.result) == ("add them", "Calculate", "17+25", "42")
    assert (last.answer, last.ended_by, last.thought) == ("It is 42.", "answer", "done")
    assert model.asked[1][2:] == [
        {
            "role": "assistant",
            "content": "Thought: add them\nAction: Calculate\nAction Input: {'expression': '17+25'}\n",
        },
        {"role": "system", "content": "Response:42\n"},
    ]
    assert last.messages[-1]["content"] == "Thought: done\nFinal Answer: It is 42."


def test_react_asks_in_the_words_that_rows_train() -> None:
    described = '{"name": "Calculate", "description": "Works out.", "paths": [{"parameters": [{"name": "expression", '
    described += '"description": "Works out."}]}]}'
    rows = [("system", described), ("user", "1+1?"), ("assistant", "2")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in rows]}
    assert system_text(TOOLS[:1]) == react_turns(row)[0]["system"]


def test_a_tool_that_fails_is_told_to_the_model() -> None:
    model = Model(
        "Action: Calculate\nAction Input: what", "Action: Python\nAction Input: 1", "Final Answer: I do not know"
    )
    first, second, last = react(Watch(model), TOOLS, ASKED)
    assert first.failed and "cannot be worked out" in model.asked[1][-1]["content"]
    assert second.failed and "There are: Calculate, Solve" in model.asked[2][-1]["content"]
    assert last.answer == "I do not know"


@pytest.mark.parametrize(
    ("text", "tool", "tool_input", "answer"),
    [
        ("It is 42.", "", "", "It is 42."), ("Thought: hm", "", "", "hm"), ("", "", "", ""),
        ("Final Answer: a\nAction: Calculate", "", "", "a\nAction: Calculate"),
        ("Action:Solve\nAction Input:x=1\nmore", "Solve", "x=1", ""), ("Action: Solve", "Solve", "", ""),
        ("Action:Solve\nAction Input:{\"equation\": \"x=1\"}", "Solve", "x=1", ""),
        ("Action：Solve\nAction Input：`x=1`", "Solve", "x=1", ""),
        ("Action: Solve\nAction Input: 'x=1'", "Solve", "x=1", ""),
        ("Action: Solve\nAction Input: [1]", "Solve", "[1]", ""), ("Action: Solve\nAction Input: {", "Solve", "{", ""),
    ],
)  # fmt: skip
def test_moves(text: str, tool: str, tool_input: str, answer: str) -> None:
    move = read_move(text)
    assert (move.tool, move.tool_input, move.answer) == (tool, tool_input, answer)


def test_react_ends_after_so_many_steps() -> None:
    model = Model(*["Action: Calculate\nAction Input: 1+1"] * 9)
    steps = list(react(Watch(model, Limits(max_steps=3)), TOOLS, ASKED))
    assert [step.ended_by for step in steps] == ["", "", "", "steps"] and len(model.asked) == 3
    assert steps[-1].messages[-1]["content"] == "Response:2\n"


def test_react_ends_when_the_time_is_over_or_it_is_stopped() -> None:
    [late] = react(Watch(Model("Action: Calculate\nAction Input: 1+1"), Limits(max_seconds=-1)), TOOLS, ASKED)
    assert late.ended_by == "time" and late.answer == "A"
    [stopped] = react(Watch(Model("Action: Calculate"), stopped=lambda: True), TOOLS, ASKED)
    assert stopped.ended_by == "stopped"


def test_an_endless_answer_is_cut() -> None:
    model = Model("x" * 10_000)
    [last] = react(Watch(model, Limits(max_characters=50)), TOOLS, ASKED)
    assert last.answer == "x" * 50 and model.letters == 51


def test_own_stop_words_are_honoured() -> None:
    [last] = react(Watch(Model("Final Answer: yes END more")), TOOLS, ASKED, stops=["END"])
    assert last.answer == "yes"


def test_moss_reads_results_in_the_middle_of_its_answer() -> None:
    model = Model(
        '<|Inner Thoughts|>: add<eot>\n<|Commands|>: Calculate("17+25"), Solve("x=1")<eoc>\n<|Results|>: made up',
        "<|MOSS|>: It is 42.<eom>\n",
    )
    first, second, last = moss(Watch(model), TOOLS, ASKED)
    assert (first.thought, first.tool, first.result, second.result) == ("add", "Calculate", "42", "solved x=1")
    assert (last.answer, last.ended_by) == ("It is 42.", "answer")
    said = (
        '<|Inner Thoughts|>: add<eot>\n<|Commands|>: Calculate("17+25"), Solve("x=1")<eoc>\n'
        '<|Results|>:\nCalculate("17+25") => 42\nSolve("x=1") => solved x=1<eor>\n'
    )
    assert model.asked[1][-1] == {"role": "assistant", "content": said}
    assert last.messages[-1]["content"] == said + "<|MOSS|>: It is 42.<eom>\n"


def test_moss_without_a_command_goes_on() -> None:
    model = Model("<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>\n", "<|MOSS|>: Hello.<eom>")
    [last] = moss(Watch(model), TOOLS, ASKED)
    assert last.answer == "Hello." and "<|Results|>: None<eor>\n" in model.asked[1][-1]["content"]


def test_moss_that_keeps_no_form_is_an_answer() -> None:
    [last] = moss(Watch(Model("Just text")), TOOLS, ASKED)
    assert last.answer == "Just text" and last.ended_by == "answer"


def test_moss_runs_few_commands_at_most() -> None:
    model = Model("<|Commands|>: " + ", ".join(['Calculate("1+1")'] * 50) + "<eoc>", "<|MOSS|>: ok")
    assert len(list(moss(Watch(model), TOOLS, ASKED))) == 5


def test_moss_says_which_tools_are_there() -> None:
    text = moss_system(TOOLS[:1], "Luna")
    assert text.startswith("You are an AI assistant whose name is Luna.")
    assert (
        "- Web search: disabled.\n- Calculator: enabled. API: Calculate(expression)\n- Equation solver: disabled."
        in text
    )
