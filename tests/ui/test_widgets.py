"""Untrusted text stays text; times, states and progress in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.store.jobs import ENDED_STATES, LIVE_STATES, Job
from studio.ui import widgets
from studio.ui.widgets import JOINER, plain

PUNCTUATION = set("\\`*_{}[]()<>#+-.!|$~^=&\"'")


@given(st.text())
def test_plain_leaves_no_sign_of_markdown_unescaped(text):
    shown = plain(text)
    rest = shown.replace("\\\\", "")
    for sign in PUNCTUATION - {"\\"}:
        assert rest.count(sign) == rest.count("\\" + sign)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp", "Zs"))))
def test_plain_loses_no_letter(text):
    shown = plain(text).replace(JOINER, "")
    unescaped = "".join(
        shown[i] for i in range(len(shown)) if not (shown[i] == "\\" and (i == 0 or not _is_escaped(shown, i)))
    )
    assert unescaped == text


def _is_escaped(text: str, index: int) -> bool:
    """Whether the character at `index` has an odd number of backslashes before it."""
    count = 0
    while index - count - 1 >= 0 and text[index - count - 1] == "\\":
        count += 1
    return count % 2 == 1


@pytest.mark.parametrize(
    "text", [":material/home:", ":smile:", ":red[x]", "https://evil.example/x", "![a](http://b/c.png)", "$x$"]
)
def test_streamlit_specials_are_broken(text):
    shown = plain(text)
    assert text not in shown
    assert not any(sign in shown for sign in (":material", ":smile", ":red", "://", "](", "$x$"))


def test_direction_marks_are_dropped_and_line_breaks_kept():
    assert plain("a\u202eb\nc") == "ab  \nc"


@pytest.mark.parametrize("seconds, words", [(0.2, "1 s"), (59, "59 s"), (75, "1 min 15 s"), (3700, "1 h 1 min")])
def test_duration(seconds, words):
    assert widgets.duration(seconds) == words


@pytest.mark.parametrize("state", LIVE_STATES + ENDED_STATES)
def test_every_state_has_a_word_and_an_icon(state):
    assert widgets.state_word(state) == state
    assert widgets.state_label(state).startswith(":material/")


def test_progress_in_words():
    job = Job(kind="train", state="running", phase="training", current=60, total=60, unit="steps")
    assert widgets.progress_text(job) == "training · 60 / 60 steps"
    assert widgets.progress_text(Job(kind="train", state="queued")) == "queued"
