"""A conversation leaves the studio as it was, and what was said in it stays text."""

import json
import re

import pytest

from studio import chat_export, chats
from studio.chats import Chat, Reply
from studio.errors import StudioError
from studio.projects import Project

HOSTILE = "<script>alert(1)</script> ![x](http://example.com/x.png)\n# head `code` <img src=x onerror=alert(1)> & \"'"
PROOF = {"weights": "abc123" * 8, "base_fingerprint": "ba5e" * 16, "adapter": "on", "template": "7e" * 32}


@pytest.fixture
def chat(project: Project) -> Chat:
    chat = chats.begin(project, "starter", {"starter": "Base", "<b>lora</b>": HOSTILE}, HOSTILE)
    for question in ("first", HOSTILE):  # the second is another branch
        turn = chats.ask(project, chat, "", question, "<i>system</i>")
        proof = PROOF | {"sampling": {"temperature": 0.5, "seed": 3}}
        chats.finish(project, {m: Reply(turn.id, m, f"{m}: {HOSTILE}", "stop", proof=proof) for m in chat.labels})
    return chat


def test_the_page_is_self_contained_and_inert(project: Project, chat: Chat) -> None:
    page = chat_export.exported(project, chat.id, "html")
    assert re.findall(r"<(script|img|iframe|link|b|i)\b", page) == []
    assert "default-src 'none'" in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<article") == 2 and "weights abc123abc123" in page


def test_markdown_stays_text(project: Project, chat: Chat) -> None:
    text = chat_export.exported(project, chat.id, "md")
    assert "<script" not in text.replace("\\<", "") and "![x]" not in text
    assert text.count("\n## ") == 1 and "> \\# head \\`code\\`" in text


def test_json_has_every_branch(project: Project, chat: Chat) -> None:
    found = json.loads(chat_export.exported(project, chat.id, "json"))
    assert [turn["question"] for turn in found["turns"]] == ["first", HOSTILE]
    assert found["turns"][0]["replies"][1]["proof"]["adapter"] == "on" and found["title"] == chat.title


def test_a_hidden_column_is_not_given_away(project: Project) -> None:
    chat = chats.begin(project, "starter", {"starter": "Base", "lora": "Tuned"}, "x")
    turn = chats.ask(project, chat, "", "Hi", blind=True)
    chats.finish(project, {m: Reply(turn.id, m, "Hello", "stop", proof=PROOF) for m in chat.labels})
    for kind in ("md", "html"):
        text = chat_export.exported(project, chat.id, kind)
        assert not re.search(r"Tuned|\bBase\*|<h3>Base|abc123", text)
    chats.vote(project, turn, "better", "lora")
    assert "Tuned** (better)" in chat_export.exported(project, chat.id, "md")


def test_an_unknown_format_is_refused(project: Project, chat: Chat) -> None:
    with pytest.raises(StudioError, match="Allowed: md, html, json"):
        chat_export.exported(project, chat.id, "pdf")
