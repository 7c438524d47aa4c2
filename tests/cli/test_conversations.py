"""`retune conversations`: found by words, read, exported, voted on and deleted."""

import json
from pathlib import Path

import pytest

from studio import chats
from studio.chats import Chat, Reply
from studio.projects import Project
from tests.cli.conftest import run


@pytest.fixture
def chat(project: Project) -> Chat:
    chat = chats.begin(project, "starter", {"starter": "Base", "tuned": "Tuned"}, "Who are you?")
    turn = chats.ask(project, chat, "", "Who are you?", blind=True)
    chats.finish(
        project, {model: Reply(turn.id, model, f"I am {model} [red]x\x1b[31m", "stop") for model in chat.labels}
    )
    chats.vote(project, turn, "better", "tuned")
    return chat


def test_list_show_export_delete(chat: Chat, tmp_path: Path) -> None:
    assert chat.id in run("conversations", "list") and chat.id in run("conversations", "list", "I am tuned")
    assert "Nothing was found" in run("conversations", "list", "elsewhere")
    said = run("conversations", "show")
    assert "> Who are you?" in said and "I am tuned [red]x" in said and "\x1b" not in said
    assert json.loads(run("conversations", "show", chat.id[:12], "--json"))["turns"][0]["vote"]["model"] == "tuned"
    run("conversations", "export", tmp_path / "x.html")
    assert "I am tuned" in (tmp_path / "x.html").read_text()
    assert "Allowed endings" in run("conversations", "export", tmp_path / "x.pdf", code=1)
    run("conversations", "export", chat.id[:12], tmp_path / "y.md")
    assert "I am tuned" in (tmp_path / "y.md").read_text()
    assert "There is no conversation" in run("conversations", "export", "1999", tmp_path / "z.md", code=1)
    assert "one conversation" in run("conversations", "export", chat.id, "more", tmp_path / "z.md", code=1)
    run("conversations", "delete", chat.id)
    assert "No conversation yet" in run("conversations", "list")
    assert "There is no conversation" in run("conversations", "show", "2026", code=1)


def test_votes_are_counted(chat: Chat) -> None:
    assert "100% (21% to 100%), which tells no preference" in run("conversations", "votes")
    [pair] = json.loads(run("conversations", "votes", "--json"))
    assert (pair["first"], pair["first_wins"]) == ("tuned", 1)
