"""XTuner's maps give what XTuner 0.1.23 gave; where it crashed on a flag the row is read; nothing in a row runs."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.data.conversation import Message
from studio.data.formats import to_conversation, turns_to_conversation
from studio.data.rows import BadRow
from studio.data.xtuner_maps import ALIASES, XTUNER_MAPS, XTUNER_PREFERENCE_MAPS, map_name
from studio.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "xtuner_maps.json").read_text(encoding="utf-8"))["cases"]
XTUNER_FORMATS = {
    "alpaca", "alpaca_zh", "arxiv", "code_alpaca", "colors", "crime_kg_assitan", "default", "law_reference", "llava",
    "llava_image_only", "medical", "msagent_react", "oasst1", "openai", "openorca", "pretrain", "sql",
    "stack_exchange", "tiny_codes", "wizardlm",
}  # fmt: skip
HI = {"role": "user", "content": "Hi"}
HELLO = {"system": "", "input": "Hi", "output": "Hello", "output_with_loss": True}
WEATHER = {"name": "weather", "description": "Look it up", "paths": [{"parameters": []}]}


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN if "output" in case], ids=lambda c: f"{c['function']}-{c['case']}"
)
def test_equal_to_xtuner(case: dict) -> None:
    row = copy.deepcopy(case["input"])
    if case["format"]:
        assert {"conversation": XTUNER_MAPS[case["format"]].convert(row)} == case["output"]
        assert set(XTUNER_MAPS[case["format"]].columns) <= set(row)
    else:
        assert XTUNER_PREFERENCE_MAPS[case["function"].removesuffix("_map_fn")](row) == case["output"]
    assert row == case["input"], "a row is never changed in place"


def test_all_of_xtuners_formats_are_there() -> None:
    assert XTUNER_FORMATS | {"moss_sft"} == set(XTUNER_MAPS)
    for name in ("crime_kg_assitant", "crime_kg_assistant"):
        assert map_name(name) == "crime_kg_assitan"
    assert set(ALIASES.values()) <= XTUNER_FORMATS


@pytest.mark.parametrize("loss", [{}, {"loss": None}, {"loss": True}, {"loss": "True"}, {"loss": "true"}])
def test_openai_where_xtuner_crashes_on_the_flag(loss: dict) -> None:
    row = {"messages": [HI, {"role": "assistant", "content": "Hello"} | loss]}
    assert XTUNER_MAPS["openai"].convert(row) == [HELLO]


@pytest.mark.parametrize("loss", [False, "False", "no", 0])
def test_openai_without_loss(loss: object) -> None:
    row = {"messages": [HI, {"role": "assistant", "content": "Hello", "loss": loss}]}
    assert XTUNER_MAPS["openai"].convert(row) == [HELLO | {"output_with_loss": False}]


def test_openai_skips_greetings_joins_questions_and_drops_what_has_no_answer() -> None:
    said = [("assistant", "Welcome"), ("user", "one."), ("user", "two."), ("assistant", "Done."), ("user", "left")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    assert XTUNER_MAPS["openai"].convert(row) == [HELLO | {"input": "one.two.", "output": "Done."}]


def by_hand(name: str, row: dict, *turns: dict) -> tuple[str, dict, list[dict]]:
    return name, row, list(turns)


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        by_hand("alpaca", {"instruction": "Draw.", "input": "", "output": "<nooutput>"}),
        by_hand("oasst1", {"text": "### Human: a### Assistant: b"}, {"input": "a", "output": "b"}),
        by_hand("stack_exchange", {"question": "q", "response": "r"}, {"input": "q", "output": "r"}),
        by_hand(
            "llava_image_only",
            {"conversations": [{"from": "human", "value": "See\n<image>"}, {"from": "gpt", "value": "A cat."}]},
            {"input": "<image>", "output": "A cat."},
        ),
        by_hand(
            "msagent_react",
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
            {"system": "", "input": "hi\n", "output": "Final Answer:hello\n"},
        ),
        by_hand(
            "moss_sft",
            {
                "meta_instruction": "You are MOSS.\n",
                "chat": {
                    "turn_1": {
                        "Human": "<|Human|>: hi<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                        "MOSS": "<|MOSS|>: hello<eom>\n",
                    }
                },
            },
            {
                "system": "You are MOSS.\n",
                "input": "hi",
                "output": "<|Inner Thoughts|>: None<eot>\n<|MOSS|>: hello<eom>\n",
            },
        ),
    ],
)
def test_by_hand(name: str, row: dict, turns: list[dict]) -> None:
    assert XTUNER_MAPS[name].convert(row) == turns


@pytest.mark.parametrize("name", ["medical", "sql", "code_alpaca", "crime_kg_assistant", "law_reference", "arxiv"])
def test_system_texts_are_filled_in(name: str) -> None:
    columns = XTUNER_MAPS[map_name(name)].columns
    [turn] = XTUNER_MAPS[map_name(name)].convert({column: column for column in columns})
    assert len(turn["system"]) > 20 and turn["system"].endswith("\n")
    assert turn["input"] == "\n".join(columns[:-1]) and turn["output"] == columns[-1]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="row 4: it has no column 'context'"):
        to_conversation({"question": "q", "answer": "a"}, "sql", 4)
    with pytest.raises(DataError, match="leaves this row out"):
        to_conversation({"instruction": "i", "input": "", "output": "<nooutput>"}, "alpaca", 1)


def test_code_inside_a_row_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(BadRow, match="no list"):
        XTUNER_MAPS["msagent_react"].convert({"conversations": f"open({str(mark)!r}, 'w').close() or []"})
    assert not mark.exists()


def test_a_tools_answer_becomes_a_system_message() -> None:
    [case] = [case for case in GOLDEN if case["function"] == "msagent_react_map_fn" and case["case"] == "list"]
    found = to_conversation(case["input"], "msagent_react", 1)
    assert found == turns_to_conversation(case["output"]["conversation"])
    assert [message.role for message in found.messages] == ["system", "user", "assistant"] * 2
    assert found.messages[3] == Message("system", "Response:{'weather': 'sunny'}\n")


@pytest.mark.timeout(60)  # what grows with the square of a text takes many minutes
@pytest.mark.parametrize("text", ["{" * 200_000, '{"a":' * 50_000, "<|startofthink|>" * 50_000, "<|startofexec|>x"])
def test_long_hostile_texts_take_no_time(text: str) -> None:
    said = [("system", text), ("user", "q"), ("assistant", text)]
    XTUNER_MAPS["msagent_react"].convert({"conversations": [{"from": who, "value": what} for who, what in said]})


pieces = st.sampled_from(
    ["<|startofthink|>", "<|endofthink|>", "<|startofexec|>", "<|endofexec|>", "Final Answer:", json.dumps(WEATHER),
     '{"api_name": "a", "parameters": {}}', "```JSON", "\n", "{", "text", '"\\ud800"']
)  # fmt: skip
speakers = st.sampled_from(["system", "user", "assistant", "human", "gpt"])
talks = st.lists(st.tuples(speakers, st.lists(pieces, max_size=8).map("".join)), max_size=5)


@settings(max_examples=300, deadline=None)
@given(talk=talks, name=st.sampled_from(["msagent_react", "wizardlm", "llava", "llava_image_only"]))
def test_any_talk_gives_a_conversation_or_a_data_error(talk: list[tuple[str, str]], name: str) -> None:
    try:
        once = to_conversation({"conversations": [{"from": who, "value": what} for who, what in talk]}, name, 3)
    except DataError as error:
        assert "row 3" in str(error)
    else:
        assert to_conversation(once.to_row(), None, 3) == once
