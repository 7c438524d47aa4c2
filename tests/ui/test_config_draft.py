"""The draft behind the Config page, without the page."""

from studio.config.catalog import preset, preset_names
from studio.ui import config_draft as drafts
from studio.ui.forms import label_of, limits


def test_differences_name_paths_and_both_values():
    one = preset("starter_lora")
    other = one.model_copy(update={"train": one.train.model_copy(update={"seed": 3}), "name": "other"})
    assert drafts.differences(other, one) == [("train.seed", 3, 0)]
    assert drafts.differences(one, one) == []


def test_each_preset_is_compared_with_the_preset_of_its_method():
    for name in preset_names():
        assert drafts.preset_for(preset(name)) == name


def test_flat():
    assert drafts.flat({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}


def test_labels_and_limits():
    from studio.config.schema import LoraSection

    assert label_of("num_steps") == "Number of steps"
    assert label_of("lora") == "LoRA"
    assert limits(LoraSection.model_fields["rank"]) == "(≥ 1, ≤ 1024)"
    assert limits(LoraSection.model_fields["dropout"]) == "(≥ 0, < 1)"
