"""Conversations are kept with every branch, found by words, voted on blindly, and gone when deleted."""

import pytest

from studio import chats
from studio.chats import Chat, Reply
from studio.errors import StudioError
from studio.projects import Project

LABELS = {"starter": "Base", "lora-1-step_20": "lora-1 · step 20"}


@pytest.fixture
def chat(project: Project) -> Chat:
    return chats.begin(project, "starter", LABELS, "Who are\n you?")


def say(project: Project, chat: Chat, question: str, parent: str = "", blind: bool = False) -> chats.Turn:
    turn = chats.ask(project, chat, parent, question, "Be brief.", blind)
    replies = {model: Reply(turn.id, model, f"{model} to {question}", "stop", proof={"seed": 1}) for model in LABELS}
    chats.finish(project, replies)
    return turn


def test_a_conversation_is_read_again_as_it_was(project: Project, chat: Chat) -> None:
    first = say(project, chat, "Who are you?")
    second = say(project, chat, "Really?", first.id)
    told = chats.read(project, chat.id)
    assert [each.turn for each in told] == [first, second]
    assert told[1].replies["starter"] == Reply(second.id, "starter", "starter to Really?", "stop", proof={"seed": 1})
    assert chats.get(project, chat.id).title == "Who are you?" and not told[0].hidden
    assert chats.messages(told, "starter", " Be brief. ", "Why?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "starter to Who are you?"},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "starter to Really?"},
        {"role": "user", "content": "Why?"},
    ]


def test_an_edited_question_is_a_branch_and_the_old_one_stays_reachable(project: Project, chat: Chat) -> None:
    first = say(project, chat, "Who are you?")
    old = say(project, chat, "Really?", first.id)
    end = say(project, chat, "And then?", old.id)
    new = say(project, chat, "Truly?", first.id)
    told = chats.read(project, chat.id)
    assert [each.turn.question for each in told] == ["Who are you?", "Truly?"]
    assert (told[1].branches, told[1].place) == ([old.id, new.id], 2)
    chats.open_branch(project, chat.id, old.id)
    assert [each.turn.id for each in chats.read(project, chat.id)] == [first.id, old.id, end.id]


def test_a_column_remembers_its_own_replies_alone(project: Project, chat: Chat) -> None:
    first = chats.ask(project, chat, "", "Hello")
    chats.finish(project, {"starter": Reply(first.id, "starter", "Hi", "stop"), "b": Reply(first.id, "b")})
    told = chats.read(project, chat.id)
    assert len(chats.messages(told, "starter", "", "x")) == 3 and len(chats.messages(told, "b", "", "x")) == 1


def test_conversations_are_found_by_title_question_and_reply(project: Project, chat: Chat) -> None:
    say(project, chat, "What is 100% of_it?")
    other = chats.begin(project, "starter", LABELS, "首都")
    assert [each.id for each in chats.listed(project)] == [other.id, chat.id]
    for words in ("who are", "100%", "of_it", "LORA-1-step_20 to"):
        assert [each.id for each in chats.listed(project, words)] == [chat.id], words
    assert [each.id for each in chats.listed(project, "首")] == [other.id]
    assert chats.listed(project, "1%0") == []
    assert chats.listed(project, "'; drop table chats; --") == []


def test_rename_and_delete(project: Project, chat: Chat) -> None:
    say(project, chat, "Hello")
    chats.rename(project, chat.id, "x" * 200)
    assert chats.get(project, chat.id).title == "x" * 59 + "…"
    with pytest.raises(StudioError, match="needs a title"):
        chats.rename(project, chat.id, " \n")
    chats.delete(project, chat.id)
    assert chats.listed(project) == []
    with pytest.raises(StudioError, match="no conversation"):
        chats.read(project, chat.id)


def test_blind_columns_stay_in_their_places_until_the_vote(project: Project, chat: Chat) -> None:
    first = say(project, chat, "a", blind=True)
    second = say(project, chat, "b", first.id, blind=True)
    assert second.models == first.models and sorted(first.models) == sorted(LABELS)
    assert all(each.hidden for each in chats.read(project, chat.id))
    vote = chats.vote(project, second, "better", "starter")
    assert [each.hidden for each in chats.read(project, chat.id)] == [True, False]
    assert chats.votes(project) == [vote]
    orders = {tuple(say(project, chat, "c", second.id, blind=True).models) for _ in range(30)}
    assert len(orders) == 2


def test_a_vote_names_a_column_exactly_when_it_is_for_one(project: Project, chat: Chat) -> None:
    turn = say(project, chat, "a", blind=True)
    for choice, model in (("better", ""), ("better", "stranger"), ("both_bad", "starter")):
        with pytest.raises(StudioError, match="cannot be voted for"):
            chats.vote(project, turn, choice, model)
    chats.vote(project, turn, "both_good")
    chats.delete(project, chat.id)
    assert len(chats.votes(project)) == 1
