"""Raw rows are found again from what they became, whole and in bounded pieces; what is not there is told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import row_life
from studio.data import raw_rows
from studio.data.formats import Conversation, Message
from studio.data.raw_rows import RawRows, keep_rows, shortened_cells
from studio.data.rows import RawRow
from studio.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


def chat(text: str) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", "yes")))


@settings(deadline=None, max_examples=40)
@given(values=st.lists(VALUES, min_size=1, max_size=20), kinds=st.integers(1, 5))
def test_every_row_comes_back_as_it_was(
    values: list[object], kinds: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("raw") / "rows"
    rows = [RawRow(number, 2 * number, value, file="a.json") for number, value in enumerate(values, start=1)]
    pairs = [(row, chat(str(row.number % kinds))) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "BLOCK_ROWS", 3)
        assert list(keep_rows(folder, pairs)) == [conversation for _, conversation in pairs]
    kept = RawRows(folder)
    for kind in range(kinds):
        expected = [row for row in rows if row.number % kinds == kind]
        found = kept.find(chat(str(kind)), most=3)
        assert (list(found.rows), found.num_rows) == (expected[:3], len(expected))
    assert kept.find(chat("edited")).num_rows == 0


def test_nothing_is_left_of_an_import_that_fails(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[RawRow, Conversation]]:
        yield RawRow(1, 1, {}), chat("a")
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        list(keep_rows(tmp_path / "raw" / "rows", failing()))
    assert not list((tmp_path / "raw").iterdir())


@pytest.mark.parametrize("file", [raw_rows.ROWS, raw_rows.BLOCKS, raw_rows.LINKS])
def test_damage_is_told(file: str, tmp_path: Path) -> None:
    list(keep_rows(tmp_path / "rows", [(RawRow(1, 1, {"a": "b" * 100}), chat("a"))]))
    path = tmp_path / "rows" / file
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(DataError, match="raw row"):
        RawRows(tmp_path / "rows").find(chat("a"))


def test_long_cells_are_cut_with_a_note() -> None:
    value = {"a": "x" * 10_000, "b": ["y"] * 1_000, "c": [{"d": "z" * 3_000}], "e": 1}
    cut = shortened_cells(value)
    assert len(json.dumps(cut)) < 6_500
    assert cut["a"].endswith("x… and 8,000 characters more") and cut["b"][-1] == "… 900" and cut["e"] == 1
    assert cut["c"][0]["d"].endswith("1,000 characters more")
    text = row_life.raw_text(replace(RawRow(1, 1), value={"a": "<script>" * 500}), "+{number}")
    assert text.endswith('+2,000"\n}')
