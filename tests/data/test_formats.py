"""Any file becomes conversations or a DataError that says where."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.data.conversation import canonical_json, canonical_line, digest_line
from studio.data.formats import (
    ALL_FORMATS,
    Conversation,
    Message,
    import_rows,
    read_conversations,
    read_rows,
    recognise,
    to_conversation,
    turns_to_conversation,
    write_conversations,
    write_turns,
)
from studio.errors import DataError

ROW = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Luna."}]}
GPT_TURN = {"from": "gpt", "value": "Luna."}
LUNA = Conversation((Message("user", "Who are you?"), Message("assistant", "Luna.")))
FILE_SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROW),
        json.dumps([ROW]),
        json.dumps({"version": 1, "data": [ROW]}),
        json.dumps(ROW, indent=2),
        json.dumps([ROW], indent=2),
        json.dumps({"data": [ROW]}, indent=2),
        "\ufeff" + json.dumps(ROW),
        "\n\r\n" + json.dumps(ROW) + "\r\n\n",
        '{"data": [\n' + json.dumps(ROW) + "\n]}",
    ],
)
def test_reads_lists_objects_with_one_list_and_lines(tmp_path: Path, content: str) -> None:
    assert read_conversations(write(tmp_path / "rows.json", content)) == [LUNA]


def test_row_numbers_count_rows_and_name_the_line_where_blank_lines_shift_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n{{broken\n")
    rows = []
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3 \(line 4\)"):
        rows.extend(number for number, _ in read_rows(path))
    assert [number for number, _ in _until_error(path)] == [1, 2]


def _until_error(path: Path) -> list[tuple[int, object]]:
    seen = []
    try:
        for pair in read_rows(path):
            seen.append(pair)
    except DataError:
        pass
    return seen


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ROW, "messages"),
        ({"conversations": ROW["messages"]}, "messages"),
        ({"conversation": [{"input": "Who are you?", "output": "Luna."}]}, "xtuner"),
        ({"instruction": "Who are you?", "input": "", "output": "Luna."}, "instruction"),
        ({"instruction_zh": "Who are", "input_zh": "you?", "output_zh": "Luna."}, "alpaca_zh"),
        ({"prompt": "Who are you?", "completion": "Luna."}, "prompt_completion"),
        ({"prompt": ROW["messages"][:1], "completion": ROW["messages"][1:]}, "prompt_completion"),
        ({"问题": "Who are you?", "回答": "Luna."}, "question_answer"),
        ({"text": "### Human: Who are you?### Assistant: Luna."}, "oasst1"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Who are you?"},
                    {"from": "gpt", "value": "Luna."},
                ]
            },
            "sharegpt",
        ),
    ],
)
def test_every_layout_is_recognised_and_gives_the_same_conversation(row: dict, name: str) -> None:
    guess = recognise([row])
    assert guess.name == name and guess.confidence >= 0.7 and guess.reason
    again = to_conversation(row, None, 1)
    assert again == to_conversation(row, name, 1)
    assert [message.content.split() for message in again.messages] == [["Who", "are", "you?"], ["Luna."]]
    assert to_conversation(again.to_row(), None, 1) == again


def test_unknown_layout_is_explained() -> None:
    guess = recognise([{"colour": "a", "size": "b"}])
    assert guess.name is None and guess.confidence == 0
    assert "'colour'" in guess.reason and '"messages"' in guess.reason


def test_a_mixed_sample_is_less_sure() -> None:
    guess = recognise([ROW, ROW, ROW, {"text": "Once."}])
    assert guess.name == "messages" and guess.confidence == 0.75
    assert "3 of 4 rows" in guess.reason
    assert recognise([]).name is None


def test_xtuner_system_and_loss_flags() -> None:
    turns = [
        {"system": "Be kind.", "input": "a", "output": "b", "output_with_loss": False},
        {"system": "", "input": "c", "output": "d"},
    ]
    assert to_conversation({"conversation": turns}, "xtuner", 1).messages == (
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b", trained=False),
        Message("user", "c"),
        Message("assistant", "d"),
    )


def test_xtuner_system_in_any_turn_and_what_ends_a_turn() -> None:
    turns = [
        {"input": "a", "output": "b", "need_eos_token": False},
        {"system": "Be short.", "output": "d", "sep": "\n"},
    ]
    found = turns_to_conversation(turns)
    assert [message.role for message in found.messages] == ["user", "assistant", "system", "user", "assistant"]
    assert found.meta == {"turns": [{"need_eos_token": False}, {"sep": "\n"}]}
    assert found.messages[3].content == ""


def test_raw_text_needs_no_question() -> None:
    once = Conversation((Message("assistant", "Once."),), {"kind": "text"})
    assert to_conversation({"text": "Once."}, None, 1) == once
    assert to_conversation({"conversation": [{"input": "", "output": "Once."}]}, None, 1) == once
    assert to_conversation({"text": " Once.\n"}, "pretrain", 1) == once
    assert Conversation.from_row(once.to_row()) == once
    with pytest.raises(DataError, match="single assistant message"):
        Conversation.from_row(LUNA.to_row() | {"meta": {"kind": "text"}})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"question": "Q", "chosen": "good", "rejected": "bad"},
        {"chosen": [("user", "Q"), ("assistant", "good")], "rejected": [("user", "Q"), ("assistant", "bad")]},
        {"prompt": "Q", "chosen": [("user", "Q"), ("assistant", "good")], "rejected": [("assistant", "bad")]},
    ],
)
def test_preference_pairs_keep_what_was_rejected(row: dict) -> None:
    def opened(value: object) -> object:
        return [{"role": role, "content": text} for role, text in value] if isinstance(value, list) else value

    row = {key: opened(value) for key, value in row.items()}
    assert recognise([row]).name == "preference"
    found = to_conversation(row, None, 1)
    assert found.messages == (Message("user", "Q"), Message("assistant", "good"))
    assert found.meta == {"kind": "preference", "rejected": [{"role": "assistant", "content": "bad"}]}
    assert Conversation.from_row(found.to_row()) == found


def test_preference_needs_one_prompt() -> None:
    sides = {side: [{"role": "user", "content": side}, {"role": "assistant", "content": "x"}] for side in ("a", "b")}
    with pytest.raises(DataError, match="the same prompt"):
        to_conversation({"chosen": sides["a"], "rejected": sides["b"]}, None, 1)


def test_llava_rows_keep_their_image() -> None:
    turns = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A cat."}]
    row = {"id": "1", "image": "coco/1.jpg", "conversations": turns}
    assert recognise([row]).name == "llava"
    found = to_conversation(row, None, 1)
    assert found.messages[0].content == "<image>\nWhat is this?"
    assert found.meta == {"kind": "image", "image": "coco/1.jpg"}


def test_tools_travel_with_the_row() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "Rain in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "weather"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    }
    found = to_conversation(row, None, 1)
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2].to_row()["tool_calls"] == [call]
    assert found.messages[3] == Message("tool", "sunny", name="weather", tool_call_id="1")
    assert found.meta == {"tools": row["tools"]}
    assert hash(found.messages) and Conversation.from_row(found.to_row()) == found
    row["messages"][1]["tool_calls"] = [call]
    with pytest.raises(DataError, match="only the assistant"):
        to_conversation(row, None, 1)


def test_sharegpt_calls_and_observations() -> None:
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "No."},
    ]
    found = to_conversation({"conversations": turns, "tools": '[{"name": "weather"}]'}, None, 1)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert "Rome" in found.messages[1].tool_calls and found.meta == {"tools": [{"name": "weather"}]}


def test_alpaca_joins_input_and_keeps_history() -> None:
    row = {
        "instruction": "Translate.",
        "input": "Good morning",
        "output": "Bonjour",
        "history": [["Hi", "Hello"]],
        "system": "Be short.",
    }
    assert [message.content for message in to_conversation(row, "alpaca", 1).messages] == [
        "Be short.",
        "Hi",
        "Hello",
        "Translate.\nGood morning",
        "Bonjour",
    ]


def test_text_blocks_join_and_images_are_refused() -> None:
    blocks = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]
    row = {"messages": [{"role": "user", "content": blocks}, ROW["messages"][1]]}
    assert to_conversation(row, None, 1).messages[0].content == "Who\nare you?"
    row["messages"][0] = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    with pytest.raises(DataError, match="text blocks only"):
        to_conversation(row, None, 1)


@pytest.mark.parametrize(
    ("value", "trained"), [(True, True), (False, False), (0, False), ("False", False), (None, None)]
)
def test_loss_flags_of_other_tools(value: object, trained: bool | None) -> None:
    row = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "Luna.", "loss": value}]}
    assert to_conversation(row, None, 1).messages[1].trained is trained


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([("system", "a")], "empty"),
        ([("assistant", "a")], "message 1 is from 'assistant', expected 'user'"),
        ([("user", "a")], "last message is from 'user'"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "message 2 is from 'user'"),
        ([("system", "s"), ("user", "a"), ("system", "b")], "message 3 is from 'system'"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "message 2 is from 'tool', expected 'assistant'"),
        ([("user", "a"), ("bot", "b")], "allowed are system, user, assistant, tool"),
        ([("user", "a"), ("assistant", "b"), ("system", "c")], "last message is from 'system'"),
    ],
)
def test_role_order_is_checked(messages: list[tuple[str, str]], reason: str) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(DataError, match=reason) as caught:
        to_conversation(row, None, 7)
    assert "row 7" in str(caught.value)


HOSTILE = {
    "nan": '{"messages": [], "meta": {"score": NaN}}',
    "infinity": '[{"a": Infinity}]',
    "huge float": json.dumps(ROW)[:-1] + ', "meta": {"score": 1e999}}',
    "huge int": json.dumps(ROW)[:-1] + ', "meta": {"score": ' + "9" * 6000 + "}}",
    "surrogate": json.dumps(ROW).replace("Luna", "\\ud800"),
    "surrogate key": json.dumps(ROW)[:-1] + ', "meta": {"\\udfff": 1}}',
    "nul": json.dumps(ROW).replace("Luna", "\\u0000"),
    "deep list": "[" * 200_000,
    "deep line": '{"a":' * 200_000,
    "deep meta": json.dumps(ROW)[:-1] + ', "meta": {"a": ' + "[" * 90 + "]" * 90 + "}}",
    "latin-1": '{"messages": "é"}'.encode("latin-1"),
    "gzip": b"\x1f\x8b\x08\x00rest",
    "empty": "",
    "blank": " \n\n",
    "empty list": "[]",
    "number": "5",
    "null row": "[null]",
    "text": "hello",
    "cut": json.dumps([ROW])[:-9],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_a_data_error_that_names_the_file(tmp_path: Path, case: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read_conversations(write(tmp_path / "rows.jsonl", HOSTILE[case]))


@pytest.mark.parametrize("name", ["missing.json", "", "a\0b"])
def test_unreadable_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        read_conversations(tmp_path / name)


def test_all_bad_rows_are_listed_at_once_and_good_ones_can_be_kept(tmp_path: Path) -> None:
    lines = [json.dumps(ROW), "{broken", json.dumps({"messages": []}), *["[]"] * 30]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    text = str(caught.value)
    assert "32 of 33 rows" in text and "row 2:" in text and "row 3:" in text and "and 12 more" in text
    imported = import_rows(path)
    assert imported.conversations == [LUNA] and imported.row_numbers == [1]
    assert [problem.row for problem in imported.problems] == list(range(2, 34))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_conversations(path, [LUNA])
    broken = Conversation((Message("user", "\ud800"), Message("assistant", "b")))
    with pytest.raises(DataError, match="surrogate"):
        write_conversations(path, [LUNA, broken])
    assert read_conversations(path) == [LUNA]
    assert [child.name for child in tmp_path.iterdir()] == ["rows.jsonl"]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KEYS = [
    "chosen",
    "rejected",
    "prompt",
    "completion",
    "text",
    "问题",
    "答案",
    "tools",
    "image",
    "chat",
    "meta_instruction",
    "Human",
    "need_eos_token",
    "question",
    "answer",
    "messages",
    "conversation",
    "conversations",
    "instruction",
    "output",
    "input",
    "history",
    "role",
    "content",
    "from",
    "value",
    "system",
    "meta",
    "trained",
    "weight",
    "tool_calls",
]
near_rows = st.recursive(
    st.sampled_from(["user", "assistant", "system", "human", 1, None, True]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=30,
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    flags = st.sampled_from([None, True, False])
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            Message("user", draw(texts), draw(flags)),
            Message("assistant", draw(texts), draw(flags)),
        ]
    return Conversation(tuple(messages), draw(st.dictionaries(texts, st.integers() | texts, max_size=3)))


@FILE_SETTINGS
@given(rows=st.lists(conversations(), min_size=1, max_size=5))
def test_round_trip(tmp_path: Path, rows: list[Conversation]) -> None:
    path = tmp_path / "rows.jsonl"
    write_conversations(path, rows)
    assert read_conversations(path) == rows
    assert [Conversation.from_row(row) for _, row in read_rows(path)] == rows


@settings(max_examples=60, deadline=None)
@given(row=conversations())
def test_a_line_and_its_digest_are_those_of_plain_json(row: Conversation) -> None:
    assert json.loads(canonical_line(row)) == row.to_row()
    plain = json.dumps(json.loads(canonical_json(row.to_row())), sort_keys=True, separators=(",", ":"))
    assert digest_line(row) == plain.encode("ascii") + b"\n"


@pytest.mark.parametrize("tools", ["{", '"x"', '[{"a": "\\ud800"}]', '[{"a": NaN}]', "[1]", {"a": 1}])
def test_tools_that_cannot_be_kept(tmp_path: Path, tools: object) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(ROW | {"tools": tools}))
    with pytest.raises(DataError, match="tools"):
        read_conversations(path)


@FILE_SETTINGS
@given(content=st.binary(max_size=200) | (values | near_rows).map(lambda value: json.dumps(value).encode()))
def test_any_file_gives_conversations_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    try:
        assert read_conversations(write(tmp_path / "any.json", content))
    except DataError as error:
        assert "any.json" in str(error)


@settings(max_examples=200, deadline=None)
@given(row=values | near_rows, format=st.sampled_from([None, *ALL_FORMATS]))
def test_any_row_gives_a_conversation_or_a_data_error(row: object, format: str | None) -> None:
    try:
        once = to_conversation(row, format, 3)
    except DataError as error:
        assert "row 3" in str(error)
    else:
        assert to_conversation(once.to_row(), None, 3) == once
        assert canonical_line(once)


def test_turns_of_xtuner_are_written_and_read_back(tmp_path: Path) -> None:
    chat = (
        Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello", trained=False),
        Message("user", "Who?"), Message("assistant", "Luna"),
    )  # fmt: skip
    rows = [Conversation(chat), Conversation((Message("assistant", "A text."),), {"kind": "text"})]
    assert write_turns(tmp_path / "x.jsonl", rows) == 2
    assert read_conversations(tmp_path / "x.jsonl", "xtuner") == rows


@pytest.mark.parametrize("row", [
    Conversation((Message("user", "?"), Message("assistant", "", tool_calls='[{"name": "f"}]'), Message("tool", "1"))),
    Conversation((Message("user", "?"), Message("assistant", "a")), {"kind": "preference", "rejected": []}),
])  # fmt: skip
def test_what_xtuners_turns_cannot_say_is_not_written(row: Conversation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: .* no form in XTuner"):
        write_turns(tmp_path / "x.jsonl", [row])
    assert list(tmp_path.iterdir()) == []
