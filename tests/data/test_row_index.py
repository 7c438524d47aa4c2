"""Rows by number out of a mapped file, and what happens when it is damaged."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data import row_index
from studio.data.formats import Conversation, Message, write_conversations
from studio.data.row_index import RowIndex
from studio.errors import DataError


def chat(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def test_rows_by_number_and_by_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat("Who are you?", "Luna."), chat('He said "hi"\nand left', "好的"), chat("Straße?", "A wide STREET")]
    path = tmp_path / "a.jsonl"
    write_conversations(path, rows)
    index = RowIndex(path)
    assert len(index) == 3 and index.rows([3, 1]) == [rows[2], rows[0]]
    assert list(index.find("")) == [1, 2, 3]
    assert list(index.find("luna")) == [1]
    assert list(index.find('"HI"\nand')) == [2]
    assert (
        list(index.find("a street")) == []
        and list(index.find("wide street")) == [3]
        and list(index.find("好")) == [2]
        and list(index.find("nobody")) == []
    )
    monkeypatch.setattr(row_index, "ROWS_PER_LOOK", 2)
    monkeypatch.setattr(row_index, "BYTES_PER_LOOK", 7)
    again = RowIndex(path)
    assert list(again.find("E")) == [1, 2, 3] and list(again.find("role")) == [] and again.rows([1, 2, 3]) == rows
    for number in (0, 4, -1):
        with pytest.raises(DataError, match="1 to 3"):
            index.row(number)


def test_damage_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content in (None, b""):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"no a\.jsonl|a\.jsonl cannot be read"):
            RowIndex(path)
    path.write_bytes(
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n\n{"mess'
    )
    index = RowIndex(path)
    assert len(index) == 2 and index.row(1) == chat("a", "b")
    with pytest.raises(DataError, match="Row 2 of a.jsonl is damaged"):
        index.row(2)


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=8))
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    rows = [chat(question.replace("\0", "0"), answer.replace("\0", "0")) for question, answer in texts]
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    write_conversations(path, rows)
    index = RowIndex(path)
    assert index.rows(range(1, len(index) + 1)) == rows
    assert list(index.find("")) == list(range(1, len(rows) + 1))
