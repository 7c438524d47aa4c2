"""What a look at an uploaded file finds."""

import json

import pytest

from studio.data.formats import Conversation, Message
from studio.errors import DataError
from studio.ui.data_table import with_edits
from studio.ui.data_upload import Choice, look_at, source_of

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize("name", ["../../etc/passwd.json", "数据.JSONL", "a/b\\c.json", "x" * 300 + ".json"])
def test_any_file_name_will_do(name):
    source = source_of(name, json.dumps(GOOD).encode())
    assert look_at(source.path, Choice()).whole.conversations[0].messages[1].content == "a"


def test_a_file_without_rows_is_refused():
    source = source_of("x.json", b"[]")
    with pytest.raises(DataError, match="empty list"):
        look_at(source.path, Choice())


def test_a_large_source_is_looked_at_by_its_first_rows(monkeypatch):
    monkeypatch.setattr("studio.datasets.AT_ONCE_BYTES", 100)
    source = source_of("x.jsonl", (json.dumps(GOOD) + "\n").encode() * 300)
    look = look_at(source.path, Choice())
    assert look.whole is None and len(look.sample) == 100 and look.guess.name == "messages"


def test_the_copy_of_an_upload_goes_with_its_session():
    source = source_of("x.json", json.dumps(GOOD).encode())
    path = source.path
    assert path.is_file()
    del source
    assert not path.exists()


def test_edits_change_the_last_turn_and_leave_out_deleted_rows():
    def row(question, answer):
        return Conversation((Message("user", question), Message("assistant", answer)), {"intent": "name"})

    rows = [row(f"q{n}", f"a{n}") for n in range(5)]
    edited = list(with_edits(rows, [2, 4], {0: {"answer": "new"}, 1: {"question": "why"}}, []))
    assert [each.messages[1].content for each in edited] == ["a0", "new", "a2", "a3", "a4"]
    assert edited[3].messages[0].content == "why" and edited[3].meta == {"intent": "name"}
    assert [each.messages[0].content for each in with_edits(rows, [2, 4], {}, [1])] == ["q0", "q1", "q2", "q4"]
