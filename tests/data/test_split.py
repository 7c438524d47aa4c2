"""Rows kept out of training have no twin among those that are trained, and are the same every time."""

import random
from pathlib import Path

import numpy as np
import pytest

from studio.data import alike
from studio.data.alike import groups
from studio.data.split import choose
from studio.data.token_files import TokenFiles, TokenWriter
from studio.data.tokens import IGNORE_INDEX, Example


def stored(folder: Path, rows: list[tuple[list[int], list[int]]]) -> TokenFiles:
    """Token files of (question, answer) rows, all behind the same three tokens."""
    writer = TokenWriter(folder, 60_000)
    for question, answer in rows:
        before = [1, 2, 3, *question]
        writer.add(Example([*before, *answer], [IGNORE_INDEX] * len(before) + answer))
    writer.close(range(len(rows)), range(1, len(rows) + 1))
    return TokenFiles(folder, "<u2")


def words(chance: random.Random, number: int) -> list[int]:
    return [chance.randrange(10, 50_000) for _ in range(number)]


def changed(text: list[int], chance: random.Random) -> list[int]:
    """The same with one token in the middle replaced."""
    copy = list(text)
    copy[chance.randrange(len(text) // 3, 2 * len(text) // 3)] = chance.randrange(10, 50_000)
    return copy


@pytest.mark.parametrize("block", [alike.BLOCK_TOKENS, 300])
def test_what_is_alike_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(alike, "BLOCK_TOKENS", block)
    chance = random.Random(3)
    rows, expected = [], []
    for group in range(60):
        question, answer = words(chance, 30), words(chance, 60)
        kind = group % 4
        rows += [(question, answer)]
        twins = {
            0: [],  # alone
            1: [(question, words(chance, 40))],  # the same question
            2: [(changed(question, chance), answer)],  # one token of ninety differs
            3: [(question, answer)] * 3,  # equal
        }[kind]
        rows += twins
        expected += [group] * (1 + len(twins))
    found = groups(stored(tmp_path / "rows", rows))
    same = found[:, None] == found[None, :]
    wanted = np.array(expected)[:, None] == np.array(expected)[None, :]
    assert not (same & ~wanted).any()  # nothing is put together that does not belong together
    assert (same & wanted).sum() >= 0.99 * wanted.sum()


def test_short_rows_that_differ_in_a_word_and_a_long_template_are_not_alike(tmp_path: Path) -> None:
    template = list(range(100, 160))
    rows = [([*template, 1000 + number], [2000 + number, 7]) for number in range(20)]
    assert len(set(groups(stored(tmp_path / "rows", rows)).tolist())) == 20


def test_one_row_and_texts_without_a_question(tmp_path: Path) -> None:
    assert groups(stored(tmp_path / "one", [([5], [6])])).tolist() == [0]
    writer = TokenWriter(tmp_path / "texts", 60_000)
    chance = random.Random(0)
    for _ in range(4):
        ids = words(chance, 40)
        writer.add(Example(ids, ids))
    writer.close(range(4), range(4))
    assert len(set(groups(TokenFiles(tmp_path / "texts", "<u2")).tolist())) == 4


def kept_out(group_of: list[int], wanted: int, seed: int = 0) -> list[int]:
    return choose(np.array(group_of), wanted, random.Random(seed)).tolist()


def test_whole_groups_are_kept_out_and_add_up() -> None:
    group_of = [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5]
    for seed in range(20):
        chosen = kept_out(group_of, 3, seed)
        assert chosen == kept_out(group_of, 3, seed) and 0 < len(chosen) <= 3
        taken = {group_of[row] for row in chosen}
        assert chosen == [row for row, group in enumerate(group_of) if group in taken]
    assert len({tuple(kept_out(group_of, 3, seed)) for seed in range(20)}) > 3
    assert len(kept_out(list(range(100)), 7)) == 7


def test_where_all_groups_are_large_a_smallest_is_kept_out_and_none_of_one_group() -> None:
    assert kept_out([0, 0, 1, 1, 1, 2, 2, 2], 1) == [0, 1]
    assert kept_out([4] * 50, 3) == []
