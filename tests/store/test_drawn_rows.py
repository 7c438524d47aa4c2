"""Rows that are drawn stand for their dataset: evenly, in bounded work, and none where they would mislead."""

from pathlib import Path

import pytest

from studio import datasets, forecast
from studio.config.catalog import preset
from studio.config.schema import RunConfig
from studio.config.yaml import with_settings
from studio.data.conversation import Conversation, Message
from studio.errors import DataError
from studio.machine import cpu
from studio.projects import Project, create_project
from studio.store import drawn_rows
from studio.store.checks import Tokens
from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path))
    return create_project("Luna")


def rows(number: int, *, letters: int) -> list[Conversation]:
    return [
        Conversation((Message("user", f"q{place}"), Message("assistant", "x" * letters + str(place))))
        for place in range(number)
    ]


def raw_text(text: str) -> Conversation:
    return Conversation((Message("assistant", text),), {"kind": "text"})


def config_for(model: Path, **settings: str) -> RunConfig:
    wanted = {"model.base": str(model), "data.sources": "{mine: 1}", "name": "tiny", **settings}
    return with_settings(preset("starter_lora"), [f"{path}={value}" for path, value in wanted.items()])


def drawn(project: Project, model: Path) -> drawn_rows.DrawnRows:
    there = datasets.get(project, "mine")
    return drawn_rows.draw(project.folder, "mine", there.fingerprint, there.num_rows, Tokens(str(model)))


def test_all_rows_of_a_small_dataset_are_drawn_in_order(project: Project, tiny_model: Path) -> None:
    datasets.save(project, "mine", rows(40, letters=9), kind="import")
    found, encode = drawn(project, tiny_model), Tokens(str(tiny_model)).encoder().encode
    assert list(found) == encode(datasets.load(project, "mine")) and found[3:5] == [found[3], found[4]]


def test_rows_that_cannot_be_used_are_passed_over(project: Project, tiny_model: Path) -> None:
    alone = Conversation((Message("user", "nobody answers"),))
    datasets.save(project, "mine", [*rows(20, letters=9), alone], kind="import")
    assert len(drawn(project, tiny_model).examples) == 20


def test_of_a_large_one_some_are_drawn_from_all_of_it(project: Project, tiny_model: Path) -> None:
    mixed = [*rows(600, letters=5), *rows(600, letters=60)]
    datasets.save(project, "mine", mixed, kind="import")
    found = drawn(project, tiny_model)
    assert len(found.examples) == drawn_rows.MOST_ROWS and len(found) == 1200
    lengths = [len(example.input_ids) for example in found]
    assert max(lengths[:600]) < min(lengths[600:])


def test_long_rows_are_fewer_and_too_long_ones_none(
    project: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.save(project, "mine", rows(200, letters=900), kind="import")
    size = datasets.get(project, "mine").num_rows * 1000
    monkeypatch.setattr(drawn_rows, "MOST_TEXT_BYTES", size // 4)
    assert 16 <= len(drawn(project, tiny_model).examples) <= 60
    monkeypatch.setattr(drawn_rows, "MOST_TEXT_BYTES", size // 100)
    drawn_rows._examples.cache_clear()
    with pytest.raises(DataError, match="cannot be drawn from"):
        drawn(project, tiny_model)


def test_that_rows_cannot_be_drawn_from_is_remembered(
    project: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page asks at every touch, and looking takes a part of a second."""
    datasets.save(project, "mine", [raw_text("raw text")] * 20, kind="import")
    looked: list[Path] = []
    real = drawn_rows._drawn_lines
    monkeypatch.setattr(drawn_rows, "_drawn_lines", lambda path: looked.append(path) or real(path))
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be drawn from"):
            drawn(project, tiny_model)
    assert len(looked) == 1


def test_of_a_file_that_is_larger_than_is_read_the_last_line_is_left_out(
    project: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.save(project, "mine", rows(200, letters=50), kind="import")
    monkeypatch.setattr(drawn_rows, "BEGINNING_BYTES", 5_000)
    found = drawn(project, tiny_model)
    assert 16 < len(found.examples) < 100 and len(found) == 200


def test_what_is_predicted_is_told_by_the_rows_and_by_the_longest_only_without_them(
    project: Project, tiny_model: Path
) -> None:
    config, on = config_for(tiny_model), cpu()
    assert forecast.load_of(project, config, on).basis == "longest"
    datasets.save(project, "mine", rows(30, letters=5), kind="import")
    short = forecast.load_of(project, config, on)
    datasets.save(project, "mine", rows(30, letters=60), kind="import")
    longer = forecast.load_of(project, config, on)
    assert short.basis == longer.basis == "drawn" and short.longest < longer.longest < config.data.max_length
    assert short.tokens_per_step == pytest.approx(config.examples_per_step * short.longest, rel=0.2)
    datasets.save(project, "mine", [raw_text("raw text " * 9)] * 20, kind="import")
    assert forecast.load_of(project, config, on).basis == "longest"


def test_proportions_stay_where_a_large_dataset_is_judged_by_fewer_rows(
    project: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.save(project, "mine", rows(200, letters=5), kind="import")
    datasets.save(project, "long", rows(200, letters=60), kind="import")
    config = config_for(tiny_model, **{"data.sources": "{mine: all, long: {rows: 20}}"})
    whole = forecast.load_of(project, config, cpu())
    monkeypatch.setattr(forecast, "MOST_JUDGED_ROWS", 20)
    forecast._judged.cache_clear()
    assert forecast.load_of(project, config, cpu()).tokens_per_step == pytest.approx(whole.tokens_per_step, rel=0.1)
