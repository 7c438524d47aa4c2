"""Compare's chat: kept and found again, branched, voted on blindly, kept as rows and probes, shown to a room."""

import json

import pytest
from streamlit.testing.v1 import AppTest

from studio import chats, datasets, suites
from studio.ui.widgets import plain
from tests.pages.model_server import ModelServer
from tests.pages.test_compare import PAGE, checkpoint, converted, finish, loaded, server, started, words

__all__ = ["checkpoint", "converted", "server", "started"]
HOSTILE = "<img src=x onerror=alert(1)> ![x](http://example.com/x.png) [a](javascript:alert(1)) :red[x] $x$ **b**"


def ask(at, question: str):
    at.chat_input(key="compare.question").set_value(question).run()
    return finish(at)


def button(at, end: str):
    """The one button whose key ends like this."""
    found = [each for each in at.button if str(each.key).endswith(end)]
    assert len(found) == 1, [each.key for each in at.button]
    return found[0]


def stored(project):
    [chat] = chats.listed(project)
    return chat, chats.read(project, chat.id)


def test_what_was_asked_is_kept_and_opened_again(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    chat, [told] = stored(project)
    assert told.replies["starter"].text == "".join(server.words)
    assert told.replies["lora-1-step_20"].proof["adapter"] == "on"
    again = open_page(PAGE)
    assert again.button(key=f"compare.open.{chat.id}").label.startswith("Who are you?")
    again.button(key=f"compare.open.{chat.id}").click().run()
    assert not again.exception and sum("Luna" in text.value for text in again.text) == 2
    again.button(key="compare.load").click().run()
    ask(again, "Really?")
    assert [each.turn.question for each in stored(project)[1]] == ["Who are you?", "Really?"]


def test_another_choice_of_columns_begins_another_conversation(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    at.multiselect(key="compare.picks").unselect("starter").run()
    at.button(key="compare.load").click().run()
    ask(at, "And you?")
    assert [list(chat.labels) for chat in chats.listed(project)] == [["lora-1-step_20"], ["starter", "lora-1-step_20"]]


def test_an_edited_question_branches_and_the_old_branch_is_reachable(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    first = stored(project)[1][0].turn
    at.text_area(key=f"compare.edit.{first.id}").set_value("Who made you?").run()
    at.button(key=f"compare.edit.{first.id}.ask").click().run()
    finish(at)
    _chat, [told] = stored(project)
    assert (told.turn.question, told.place, len(told.branches)) == ("Who made you?", 2, 2)
    at.button(key=f"compare.branch.{told.turn.id}.-1").click().run()
    assert stored(project)[1][0].turn.id == first.id and "1 / 2" in words(at)


def test_answering_again_takes_the_next_seed(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    at.number_input(key="compare.seed").set_value(7)
    ask(at, "Who are you?")
    at.button(key="compare.again").click().run()
    finish(at)
    assert [body["sampling"]["seed"] for body in server.asked] == [7, 8]
    assert len(stored(project)[1][0].branches) == 2


def test_each_column_may_be_asked_in_its_own_way(open_page, server: ModelServer) -> None:
    at = loaded(open_page)
    at.toggle(key="compare.own").set_value(True).run()
    at.slider(key="compare.own.lora-1-step_20.temperature").set_value(0.8).run()
    ask(at, "Who are you?")
    assert [column["sampling"]["temperature"] for column in server.asked[0]["columns"]] == [0.0, 0.8]


def test_blind_columns_have_no_names_until_the_vote(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    at.toggle(key="compare.blind").set_value(True).run()
    ask(at, "Who are you?")
    turn = stored(project)[1][0].turn
    said = [block.value for block in at.markdown]
    assert "**A**" in said and "**B**" in said
    assert not any("Base" in each or "step 20" in each for each in said) and "tokens/s" not in words(at)
    assert not any("proof" in str(each.key) for each in at.button)
    at.button(key=f"compare.vote.{turn.id}.better.lora-1-step_20").click().run()
    assert "step 20** :material/trophy:" in words(at) and "tokens/s" in words(at)
    assert "Too few votes to tell" in words(at)
    at.button(key=f"compare.keep.{turn.id}").click().run()
    [dataset] = datasets.listed(project)
    assert (dataset.name, dataset.num_rows) == ("chosen", 1) and "Row 1 of chosen was added" in words(at)
    at.button(key="compare.take_back").click().run()
    assert datasets.listed(project) == []


def test_what_made_an_answer_and_its_exact_prompt(open_page, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    button(at, "lora-1-step_20.proof").click().run()
    assert not at.exception
    assert "`1abc123456789000`"[:10] in words(at) and "adapter on" in words(at)
    assert json.loads(at.code[0].value)["base_fingerprint"] == "ba5e" * 16


def test_a_repaired_answer_becomes_a_row_and_a_probe(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    button(at, "starter.keep").click().run()
    assert not at.exception and "".join(server.words) in [area.value for area in at.text_area]
    dialog = AppTest.from_function(keep_form, default_timeout=60).run()
    dialog.text_area(key="k.answer").set_value("I am Luna.")
    dialog.button(key="k.add").click().run()
    assert datasets.load(project, "chosen")[0].messages[-1].content == "I am Luna."
    dialog.text_input(key="k.says").set_value("Luna")
    dialog.button(key="k.add_probe").click().run()
    assert not dialog.exception and "Luna" in suites.text_of(project, "from_chats")


def keep_form() -> None:
    """The dialog's content; a dialog is gone at the next run of a test's page."""
    from studio import chats
    from studio.projects import list_projects
    from studio.ui.chat_keep import probe_form, row_form

    [project] = list_projects()
    [told] = chats.read(project, chats.listed(project)[0].id)
    row_form(project, told, told.replies["starter"], "k")
    probe_form(project, told, told.replies["starter"], "k")


@pytest.mark.parametrize("off, said", [({"bit_equal": True, "max_difference": 0.0}, "bit for bit"),
                                       ({"bit_equal": False, "max_difference": 0.5}, "by up to 0.5")])  # fmt: skip
def test_the_self_test_says_what_it_measured(open_page, server: ModelServer, off: dict, said: str) -> None:
    server.self_test["off"] = off
    at = loaded(open_page)
    at.button(key="compare.selftest").click().run()
    assert said in words(at) and "moves the logits by up to 2.5" in words(at)


def test_the_demo_view_shows_the_newest_alone(open_page, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "First")
    ask(at, "Second")
    at.button(key="compare.demo.on").click().run()
    assert "**Second**" in words(at) and "**First**" not in words(at)
    assert not [each for each in at.multiselect if each.key == "compare.picks"]
    server.word_seconds = 0.5
    at.chat_input(key="compare.question").set_value("Third").run()
    assert "**Third**" in words(at) and "**Second**" not in words(at)  # nor while it is being answered
    at.button(key="compare.stop").click().run()
    finish(at)
    at.button(key="compare.demo.off").click().run()
    assert "**First**" in words(at)


def test_what_people_and_models_write_is_shown_as_text(open_page, project, server: ModelServer) -> None:
    server.words = [HOSTILE]
    at = loaded(open_page)
    ask(at, HOSTILE)
    chat, _told = stored(project)
    chats.rename(project, chat.id, HOSTILE[:50])
    at.run()
    shown = [block.value for block in at.markdown] + [each.label for each in at.button]
    assert any(text.value.startswith(HOSTILE) for text in at.text)
    assert any(plain(HOSTILE) in each for each in shown)
    raw = ("!" + "[x](", "](javascript", ":red[", " <img", "$x$")
    assert not any(mark in each for each in shown for mark in raw)


def test_rename_and_delete(open_page, project, server: ModelServer) -> None:
    at = loaded(open_page)
    ask(at, "Who are you?")
    chat, _told = stored(project)
    at.text_input(key=f"compare.title.{chat.id}").set_value("Before and after").run()
    at.button(key="compare.rename").click().run()
    assert stored(project)[0].title == "Before and after"
    at.checkbox(key=f"compare.sure.{chat.id}").set_value(True).run()
    at.button(key="compare.delete").click().run()
    assert not at.exception and chats.listed(project) == []
