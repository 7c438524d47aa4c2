"""Questions and answers from any table, by hand or by the names of its columns."""

import pytest

from studio.data.columns import Columns, guess_columns
from studio.data.conversation import Message
from studio.data.formats import to_conversation
from studio.errors import DataError


@pytest.mark.parametrize(
    ("names", "question", "answer"),
    [
        (["Question", "Focus (Drug)", "Question Type", "Answer", "Section Title", "URL"], "Question", "Answer"),
        (["id", "问题", "回答"], "问题", "回答"),
        (["提问", "答案"], "提问", "答案"),
        (["问", "答"], "问", "答"),
        ([" Prompt ", "RESPONSE"], " Prompt ", "RESPONSE"),
        (["指令", "输出"], "指令", "输出"),
        (["编号", "患者提问", "医生回复", "科室"], "患者提问", "医生回复"),
        (["question_id", "userQuestion", "best_answer", "answer score"], "userQuestion", "best_answer"),
        (["用户问题", "问题编号", "答案"], "用户问题", "答案"),
    ],
)
def test_obvious_names_are_guessed(names: list[str], question: str, answer: str) -> None:
    assert guess_columns(names) == Columns(question, answer)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["text"],
        ["question"],
        ["drug", "answer"],
        ["questionable", "answers to"],
        ["a question", "b question", "answer"],
        ["问题与回答", "回答"],
    ],
)
def test_others_are_not(names: list[str]) -> None:
    assert guess_columns(names) is None


def test_by_hand_with_system_and_history() -> None:
    columns = Columns.parse("question=Q, answer=A,system=S,history=H")
    assert Columns.parse(columns.to_text()) == columns
    row = {"Q": "two?", "A": 2, "S": "Count.", "H": '[["one?", "1"]]', "other": None}
    assert to_conversation(row, None, 1, columns).messages == (
        Message("system", "Count."),
        Message("user", "one?"),
        Message("assistant", "1"),
        Message("user", "two?"),
        Message("assistant", "2"),
    )


@pytest.mark.parametrize("text", ["", "question=a", "question=a,reply=b", "a,b", "question=,answer=b"])
def test_a_mapping_that_says_too_little(text: str) -> None:
    with pytest.raises(DataError, match="question=Question,answer=Answer"):
        Columns.parse(text)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": "x"}, "no column 'a'"),
        ({"q": None, "a": " "}, "columns 'q' and 'a' are empty"),
        ({"q": ["x"], "a": "x"}, "column 'q' must be text"),
        ({"q": "x", "a": "y", "h": "no json"}, "the history must be"),
        ({"q": "x", "a": "y", "h": '[["\\ud800", "b"]]'}, "half a character"),
    ],
)
def test_rows_that_lack_something(row: dict, said: str) -> None:
    with pytest.raises(DataError, match=f"row 5: .*{said}"):
        to_conversation(row, None, 5, Columns("q", "a", history="h"))


def test_an_empty_answer_is_imported_for_the_lint_to_name() -> None:
    """As in every other layout."""
    rows = ({"question": "x", "answer": ""}, {"instruction": "x", "output": ""}, {"prompt": "x", "completion": ""})
    for row in rows:
        assert to_conversation(row, None, 1).messages[-1] == Message("assistant", "")
