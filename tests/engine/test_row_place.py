"""The place that the Data page tells of a row is the one that the trainer gives it."""

from collections.abc import Callable
from itertools import islice

import pytest

from studio import datasets, models, row_place
from studio.config.schema import RunConfig
from studio.data.formats import Conversation, Message
from studio.data.named import load_template
from studio.data.packing import plan_step
from studio.data.tokens import TextTokenizer
from studio.engine.batches import examples_from, load_corpus
from studio.errors import DataError
from studio.projects import Project
from tests.engine.conftest import add_dataset, conversations


@pytest.mark.parametrize("pack", ["none", "sequence", "tree"])
def test_every_row_is_where_the_trainer_puts_it(
    training_project: Project, tiny_config: Callable[..., RunConfig], pack: str
) -> None:
    config = tiny_config(**{"data.pack": pack})
    folder = models.require(config.model.base)
    corpus = load_corpus(training_project.folder, config, load_template("", folder), TextTokenizer.load(folder))
    steps = list(islice(examples_from(corpus, config, 0), 40))
    uses = []
    for row in range(1, 25):
        place = row_place.place_of(training_project, config, "identity", row)
        uses.append(place.use)
        if place.use != row_place.TRAINED:
            continue
        examples = steps[place.step - 1]
        plan = plan_step(examples, pack, config.data.max_length, config.train.micro_batch_size)
        members = plan[place.micro_batch - 1][place.line - 1]
        assert [len(examples[each].input_ids) for each in members] == [each.num_tokens for each in place.neighbours]
        own = place.neighbours[place.own]
        assert (own.source, own.row) == ("identity", row)
        assert place.num_shared <= own.num_tokens and (pack == "tree" or not place.num_shared)
    assert uses.count(row_place.KEPT_OUT) == 2 and row_place.LEFT_OUT not in uses
    assert len(corpus.valid) == 3


def test_rows_that_have_no_place(training_project: Project, tiny_config: Callable[..., RunConfig]) -> None:
    long = Conversation((Message("user", "word " * 300), Message("assistant", "never read")))
    add_dataset(training_project, "identity", [*conversations(3), long])
    config = tiny_config(**{"data.sources": {"identity": 1.0}, "data.valid_share": 0})
    assert row_place.place_of(training_project, config, "identity", 4).use == row_place.LEFT_OUT
    assert row_place.place_of(training_project, config, "identity", 3).use == row_place.TRAINED
    with pytest.raises(DataError, match="no row 5"):
        row_place.place_of(training_project, config, "identity", 5)
    with pytest.raises(DataError, match="does not train on 'general'"):
        row_place.place_of(training_project, config, "general", 1)
    assert datasets.get(training_project, "identity").num_rows == 4
