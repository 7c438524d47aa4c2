"""The report counts what is there, with or without tokens, and its bins cover every length."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data.conversation import Conversation, Message
from studio.data.languages import language_of
from studio.data.report import MOST_SOURCES, Size, histogram, percentiles, report_on


def row(question: str, answer: str, **meta: object) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), meta)


ROWS = [
    row("What is this?", "A book.", source="a"),
    row("这是什么？", "这是一本书。", source="b"),
    row("What is this?", "A book.", source="a"),
    Conversation((Message("system", "Be brief."), *row("Qui ?", "Élise était déjà là.").messages * 2)),
    Conversation((Message("assistant", "A document. " * 9),), {"kind": "text"}),
]


def by_words(rows: Sequence[Conversation]) -> list[Size | None]:
    """As many tokens as words; Chinese cannot be encoded."""
    return [_size(each) for each in rows]


def _size(conversation: Conversation) -> Size | None:
    words = [len(message.content.split()) for message in conversation.messages]
    return Size(sum(words), words[-1], sum(words) > 15) if conversation.messages[0].content.isascii() else None


def test_counts_of_rows() -> None:
    report = report_on(ROWS)
    assert report.num_rows == 5 and report.num_duplicates == 1
    assert report.kinds == {"chat": 4, "text": 1} and report.sources == {"a": 2, "": 2, "b": 1}
    assert report.languages == {"en": 3, "zh": 1, "other": 1} and report.turns == {0: 1, 1: 3, 2: 1}
    assert (report.num_with_system, report.longest_row, report.longest_characters) == (1, 5, 108)
    assert report.num_tokens == 0 and report.lengths == {} and report.histogram == [] and report.trained_share == 0


def test_lengths_and_trained_tokens() -> None:
    report = report_on(ROWS, by_words)
    assert (report.num_refused, report.num_truncated, report.num_untrained) == (1, 1, 0)
    assert report.num_tokens == 5 + 5 + 14 + 18 and report.num_trained_tokens == 2 + 2 + 4 + 18
    assert report.trained_share == pytest.approx(26 / 42)
    assert report.lengths == {"shortest": 5, "median": 5, "p90": 18, "p99": 18, "longest": 18}
    assert (report.longest_row, report.longest_tokens) == (5, 18)
    assert sum(rows for *_, rows in report.histogram) == 4


def test_an_empty_dataset() -> None:
    report = report_on([], by_words)
    assert (report.num_rows, report.longest_row, report.histogram) == (0, 0, [])


def test_progress_and_many_sources() -> None:
    seen: list[int] = []
    report = report_on((row(str(n), "a", source=f"s{n}") for n in range(600)), progress=seen.append)
    assert seen == [256, 512, 600] and len(report.sources) == MOST_SOURCES + 1
    assert report.sources["others"] == 600 - MOST_SOURCES


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=60))
def test_bins_cover_every_length_once(lengths: list[int]) -> None:
    bins = histogram(Counter(lengths))
    assert len(bins) <= 16 and sum(rows for *_, rows in bins) == len(lengths)
    for start, below, rows in bins:
        assert rows == sum(start <= length < below for length in lengths)
    found = percentiles(Counter(lengths))
    assert found["shortest"] == min(lengths) and found["longest"] == max(lengths)
    assert found["median"] == sorted(lengths)[(len(lengths) - 1) // 2]
    assert sum(length <= found["p90"] for length in lengths) >= 0.9 * len(lengths)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Who are you?", "en"),
        ("The café that a man who reads a great many books on the history of France went to every morning", "en"),
        ("你是谁？我是Luna，由Shane开发的助手。", "zh"),
        ("これは本です。とても面白い。", "other"),
        ("Où était-il passé ? Déjà rentré à l'hôtel.", "other"),
        ("Привет, как дела?", "other"),
        ("12 + 34 = 46", "other"),
        ("", "other"),
        ("Explain 你好 in a sentence that is long enough for anyone", "en"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language
