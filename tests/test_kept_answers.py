"""An answer becomes a row with its lint, and can be taken back."""

import pytest

from studio import chats, datasets, kept_answers, suites
from studio.chats import Reply
from studio.errors import DataError
from studio.projects import Project


@pytest.fixture
def told(project: Project) -> list[chats.Told]:
    chat = chats.begin(project, "starter", {"starter": "Base"}, "Hi")
    first = chats.ask(project, chat, "", "Hi", "Be brief.")
    chats.finish(project, {"starter": Reply(first.id, "starter", "Hello.", "stop")})
    second = chats.ask(project, chat, first.id, "Who are you?", "Be brief.")
    chats.finish(project, {"starter": Reply(second.id, "starter", "I am SmolLM.", "stop")})
    return chats.read(project, chat.id)


def test_a_repaired_answer_becomes_a_row_of_a_new_and_then_of_a_known_dataset(project: Project, told) -> None:
    row = kept_answers.conversation_of(told[:1], told[1], "starter", " I am Luna. ")
    assert [(message.role, message.content) for message in row.messages] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Who are you?"),
        ("assistant", "I am Luna."),
    ]  # fmt: skip
    kept = kept_answers.add_row(project, "chosen", row, "kept from Compare")
    assert (kept.dataset, kept.row, kept.findings) == ("chosen", 1, ())
    again = kept_answers.add_row(project, "chosen", row, "kept from Compare")
    assert again.row == 2 and [finding.rule for finding in again.findings] == ["duplicate"]
    assert datasets.load(project, "chosen") == [row, row]
    assert datasets.versions(project, "chosen")[0].made_by == "kept from Compare"


def test_it_can_be_taken_back(project: Project, told) -> None:
    row = kept_answers.conversation_of([], told[0], "starter", "Hello!")
    first = kept_answers.add_row(project, "chosen", row, "x")
    second = kept_answers.add_row(project, "chosen", row, "x")
    with pytest.raises(DataError, match="at version 2 by now"):
        kept_answers.take_back(project, first)
    kept_answers.take_back(project, second)
    assert len(datasets.load(project, "chosen")) == 1
    new = kept_answers.add_row(project, "new", row, "x")
    kept_answers.take_back(project, new)
    assert [dataset.name for dataset in datasets.listed(project)] == ["chosen"]


def test_a_turn_becomes_a_probe(project: Project, told) -> None:
    suite = kept_answers.add_probe(project, "from_chats", told[:1], told[1], "starter", " Luna ", "SmolLM")
    kept_answers.add_probe(project, "from_chats", [], told[0], "starter", says_not="SmolLM")
    [group] = suite.values()["groups"]
    [probe] = group["probes"]
    assert [message["content"] for message in probe["messages"]] == ["Be brief.", "Hi", "Hello.", "Who are you?"]
    assert [(each["type"], each["value"]) for each in probe["assert"]] == [
        ("icontains", "Luna"), ("not-icontains", "SmolLM"),
    ]  # fmt: skip
    assert suites.text_of(project, "from_chats").count("messages:") == 2
    with pytest.raises(DataError, match="something to look for"):
        kept_answers.add_probe(project, "from_chats", [], told[0], "starter", " ")


def test_nothing_and_nonsense_are_refused(project: Project, told) -> None:
    with pytest.raises(DataError, match="teaches nothing"):
        kept_answers.conversation_of([], told[0], "starter", " \n")
    row = kept_answers.conversation_of([], told[0], "starter", "Hello {{NAME}}")
    with pytest.raises(DataError, match="cannot name"):
        kept_answers.add_row(project, "../x", row, "x")
    assert any(finding.severity == "error" for finding in kept_answers.add_row(project, "y", row, "x").findings)
