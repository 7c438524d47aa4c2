"""From a project's datasets to the tensors of a step."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.config.schema import RunConfig
from studio.data.formats import Conversation, Message
from studio.data.template import ChatTemplate
from studio.data.tokens import IGNORE_INDEX, Example, TextTokenizer
from studio.engine.attention import Masked
from studio.engine.batches import Batch, Corpus, collate, examples_from, load_corpus, make_batches, make_rows
from studio.errors import DataError
from studio.projects import Project
from tests.engine.conftest import add_dataset, conversations

Make = Callable[..., RunConfig]


def corpus_of(project: Project, model: Path, config: RunConfig) -> Corpus:
    return load_corpus(project.folder, config, ChatTemplate.load(model), TextTokenizer.load(model))


def test_split_is_fixed_by_the_seed_and_loses_no_row(
    training_project: Project, tiny_model: Path, tiny_config: Make
) -> None:
    first, again = (corpus_of(training_project, tiny_model, tiny_config()) for _ in range(2))
    other = corpus_of(training_project, tiny_model, tiny_config(**{"train.seed": 1}))
    assert first == again and first.valid != other.valid
    assert first.sizes == {"identity": 22, "general": 7} and len(first.valid) == 3
    none = corpus_of(training_project, tiny_model, tiny_config(**{"data.valid_share": 0.0}))
    assert none.sizes == {"identity": 24, "general": 8} and not none.valid
    everything = [tuple(example.input_ids) for examples in none.train.values() for example in examples]
    split = [tuple(example.input_ids) for examples in (*first.train.values(), first.valid) for example in examples]
    assert Counter(everything) == Counter(split)


def test_rows_without_a_trained_token_are_left_out_and_named(
    training_project: Project, tiny_model: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Conversation((Message("user", "red " * 200), Message("assistant", "Too late.")))
    add_dataset(training_project, "identity", [long, *conversations(9), long])
    corpus = corpus_of(training_project, tiny_model, tiny_config(**{"data.valid_share": 0.0}))
    assert corpus.sizes["identity"] == 9
    assert "identity: 2 of 11 rows left out, nothing in them is trained: row 1, 11." in capsys.readouterr().out


def test_a_dataset_without_any_usable_row_is_an_error(
    training_project: Project, tiny_model: Path, tiny_config: Make
) -> None:
    add_dataset(training_project, "identity", [Conversation((Message("user", "a"), Message("assistant", "b", False)))])
    with pytest.raises(DataError, match="identity.*token to train on"):
        corpus_of(training_project, tiny_model, tiny_config())


def test_a_dataset_whose_file_is_gone(training_project: Project, tiny_model: Path, tiny_config: Make) -> None:
    training_project.path("data", "general.jsonl").unlink()
    with pytest.raises(DataError, match="general.*gone"):
        corpus_of(training_project, tiny_model, tiny_config())


def test_steps_from_a_position_are_those_of_the_whole(
    training_project: Project, tiny_model: Path, tiny_config: Make
) -> None:
    config = tiny_config()
    corpus = corpus_of(training_project, tiny_model, config)
    whole = list(islice(examples_from(corpus, config, 0), 40))
    assert all(len(examples) == config.examples_per_step for examples in whole)
    for step in (1, 11, 23):
        later = islice(examples_from(corpus, config, step * config.examples_per_step), 40 - step)
        assert list(later) == whole[step:]


def make_example(ids: list[int], first_trained: int) -> Example:
    return Example(ids, [IGNORE_INDEX] * first_trained + ids[first_trained:])


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    made = []
    for ids in draw(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=12), min_size=1, max_size=8)):
        made.append(make_example(ids, draw(st.integers(0, len(ids) - 1))))
    return made


def pairs_of(rows: list[Example]) -> Counter[tuple[tuple[int, ...], int]]:
    """What is asked of the model: everything before a trained token, and that token."""
    asked: Counter[tuple[tuple[int, ...], int]] = Counter()
    for row in rows:
        for index in range(1, len(row.labels)):
            if row.labels[index] != IGNORE_INDEX:
                asked[tuple(row.input_ids[:index]), row.labels[index]] += 1
    return asked


@settings(deadline=None)  # torch's first call takes long
@given(examples(), st.sampled_from(["none", "sequence"]), st.integers(1, 4))
def test_batches_ask_for_every_trained_token_once(rows: list[Example], pack: str, micro_batch_size: int) -> None:
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for batch in make_batches(rows, pack, 16, micro_batch_size, pad_id=0):
        width = batch.input_ids.shape[1]
        assert batch.input_ids.shape[0] <= micro_batch_size and batch.layout is None
        for place, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True):
            row, column = divmod(place, width)
            start = column - int(batch.position_ids[row, column])
            found[tuple(batch.input_ids[row, start : column + 1].tolist()), target] += 1
    assert found == pairs_of(rows)


def rows_of(rows: list[Example], pack: str, max_length: int, micro_batch_size: int, most: int) -> list[Batch]:
    cpu = torch.device("cpu")
    return make_rows(rows, pack, max_length, micro_batch_size, lambda ends: Masked(ends, cpu), most)


@settings(deadline=None)
@given(examples(), st.sampled_from(["none", "sequence", "tree"]), st.integers(12, 40), st.integers(1, 4))
def test_rows_ask_for_every_trained_token_as_often_as_it_is_trained(
    rows: list[Example], pack: str, max_length: int, micro_batch_size: int
) -> None:
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    most = 160  # as large as the largest tree, four lines of 40 tokens
    batches = rows_of(rows, pack, max_length, micro_batch_size, most)
    for batch in batches:
        assert batch.layout is not None and batch.layout.mask is not None
        assert batch.input_ids.shape == batch.position_ids.shape and batch.input_ids.shape[1] <= most
        for place, target, weight in zip(batch.places, batch.targets, batch.weights, strict=True):
            seen = batch.layout.mask[0, 0, place].nonzero().flatten()
            assert batch.position_ids[0, seen].tolist() == list(range(len(seen)))
            found[tuple(batch.input_ids[0, seen].tolist()), int(target)] += int(weight)
    assert found == pairs_of(rows)
    assert sum(batch.num_trained_tokens for batch in batches) == sum(row.num_trained_tokens for row in rows)
    assert sum(batch.num_tokens for batch in batches) == sum(len(row.input_ids) for row in rows)


def test_equal_rows_are_computed_once() -> None:
    row = make_example([5, 6, 7, 8], 2)
    (batch,) = rows_of([row] * 16, "tree", 64, 4, 64)
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.targets.tolist() == [7, 8] and batch.weights.tolist() == [16, 16]


def test_trees_stand_one_after_another_and_see_nothing_of_each_other() -> None:
    rows = [make_example([1, 2, 3, 4], 1), make_example([1, 5, 6], 1), make_example([7, 8], 1)]
    (batch,) = rows_of(rows, "tree", 64, 4, 64)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 7]] and batch.position_ids.tolist() == [[0, 1, 2, 1, 0]]
    assert batch.layout is not None and batch.layout.mask is not None
    assert batch.layout.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert batch.places.tolist() == [0, 0, 1, 2, 3, 4] and batch.targets.tolist() == [2, 5, 3, 4, 6, 8]


def test_a_row_has_no_more_tokens_than_wanted_unless_an_example_has() -> None:
    rows = [make_example([n] * 9, 1) for n in range(1, 7)]
    assert [batch.input_ids.shape for batch in rows_of(rows, "sequence", 18, 4, 20)] == [(1, 16), (1, 16), (1, 16)]
    assert [batch.input_ids.shape for batch in rows_of(rows, "none", 9, 4, 3)] == [(1, 8)] * 6


def test_positions_restart_with_every_packed_example() -> None:
    batch = collate([[make_example([1, 2, 3], 1), make_example([4, 5], 0)], [make_example([6, 7], 1)]], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.places.tolist() == [0, 1, 3, 5] and batch.targets.tolist() == [2, 3, 5, 7]
    assert batch.num_tokens == 7
