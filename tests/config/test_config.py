"""Configs: all problems at once, comments kept, the same after a round trip, and YAML that is only data."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from studio.config.catalog import preset, preset_names, preset_text
from studio.config.schema import RowCount, RunConfig, field_at, parse_config
from studio.config.yaml import load_config, load_text, save_config, update_text, with_settings
from studio.errors import ConfigError

FIVE_MISTAKES = """
method: lorra
modle: {base: starter}
train:
  learning_rate: -1
  num_steps: ten
  optimiser: adamw
"""


def problems_of(text: str) -> dict[str, Any]:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert "nothing was started" in caught.value.hint
    return {problem.path: problem for problem in caught.value.problems}


def test_every_problem_is_named_with_its_place_and_what_is_allowed() -> None:
    problems = problems_of(FIVE_MISTAKES)
    assert set(problems) == {"method", "modle", "train.learning_rate", "train.num_steps", "train.optimiser"}
    assert problems["method"].allowed == "lora, qlora, full, prompt_tuning, prefix_tuning"
    assert "'lorra'" in problems["method"].message
    assert "model" in problems["modle"].allowed
    assert problems["train.learning_rate"].allowed == "> 0, <= 1" and "-1" in problems["train.learning_rate"].message
    assert "optimizer" in problems["train.optimiser"].allowed


def test_the_message_lists_them_all() -> None:
    with pytest.raises(ConfigError, match="has 5 problems") as caught:
        load_text(FIVE_MISTAKES)
    assert all(f"  - {path}" in str(caught.value) for path in ("method", "modle", "train.num_steps"))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("train: {num_steps: 5, warmup_steps: 5}", "(top)"),
        ("train: {num_steps: null, num_epochs: null}", "(top)"),
        ("data: {sources: {}}", "data.sources"),
        ("data: {sources: {identity: 0}}", "data.sources.identity"),
        ("data: {sources: {../../etc: 1}}", "data.sources.../../etc.[key]"),
        ("data: {sources: {identity: {rows: 0}}}", "data.sources.identity.rows"),
        ("data: {sources: {identity: {}}}", "data.sources.identity.rows"),
        ("data: {sources: {identity: {rows: 5, of: 6}}}", "data.sources.identity.of"),
        ("data: {sources: {identity: 2000 rows}}", "data.sources.identity"),
        ("data: {sources: {identity: every}}", "data.sources.identity"),
        ("data: {recipes: {alpaca: {source: 'hf:a/b', splt: train}}}", "data.recipes.alpaca.splt"),
        ("data: {recipes: {alpaca: {format: alpaca}}}", "data.recipes.alpaca.source"),
        ("train: {warmup_ratio: 1}", "train.warmup_ratio"),
        ("task: ppo", "task"),
        ("name: ../../etc", "name"),
        ("name: ''", "name"),
        ("train: {learning_rate: .nan}", "train.learning_rate"),
        ("train: {learning_rate: .inf}", "train.learning_rate"),
        ("train: {micro_batch_size: 1.5}", "train.micro_batch_size"),
        ("train: {gradient_checkpointing: sometimes}", "train.gradient_checkpointing"),
        ("train: 3", "train"),
        ("- a\n- b", "(top)"),
        ("", "(top)"),
        ("lora: {target_modules: 'q_proj; rm -rf'}", "lora.target_modules"),
    ],
)
def test_one_mistake_each(text: str, path: str) -> None:
    assert path in problems_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\t- x",
        "a: 1\na: 2",
        "!!python/object/apply:os.system ['touch canary']",
        "a: &a [*a]",
        "a: &a [1]\n" + "".join(f"b{n}: *a\n" for n in range(60)),
        "[" * 5000,
        "x" * 1_000_001,
        "\x00",
    ],
    ids=["open", "colons", "tab", "twice", "tag", "itself", "aliases", "deep", "long", "nul"],
)
def test_what_is_no_yaml_for_us(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems_of(text)
    assert not (tmp_path / "canary").exists()


def test_aliases_of_aliases_are_not_followed() -> None:
    """25 lines that stand for 33 million values."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 26))
    for text in (bomb, "model: &m {base: starter}\ntrain: *m\n", "a: &a {b: 1}\nc: {<<: *a}\n"):
        with pytest.raises(ConfigError, match="alias .*write it out"):
            load_text(text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc"])
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: tiny\n")
    assert load_config(tmp_path / "c.yaml").name == "tiny"


def test_comments_and_order_survive_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# why\ntrain:\n  # slow and sure\n  learning_rate: 1e-4  # peak\nname: tiny\n", encoding="utf-8")
    config = with_settings(load_config(path), ["train.learning_rate=2e-4", "lora.rank=4"])
    save_config(path, config)
    text = path.read_text(encoding="utf-8")
    assert "# why" in text and "# slow and sure" in text and "# peak" in text
    assert text.index("train:") < text.index("name:")
    assert load_config(path) == config and config.train.learning_rate == 2e-4


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_a_round_trip_with_its_comments(name: str) -> None:
    text = update_text(preset_text(name), preset(name))
    assert load_text(text) == preset(name)
    assert all(line in text for line in preset_text(name).splitlines() if line.strip().startswith("#"))
    assert update_text(text, preset(name)) == text


slugs = st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,20}\Z")
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
configs = st.fixed_dictionaries(
    {
        "name": slugs,
        "method": st.sampled_from(["lora", "qlora", "full"]),
        "model": st.fixed_dictionaries({"base": texts.filter(bool)}),
        "data": st.fixed_dictionaries(
            {"sources": st.dictionaries(slugs, st.floats(0.01, 9), min_size=1, max_size=3)},
        ),
        "train": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-9, 1),
                "num_steps": st.integers(6, 10**6),
                "seed": st.integers(0, 2**31 - 1),
            }
        ),
        "record": st.fixed_dictionaries({"sample_prompts": st.lists(texts, max_size=4)}),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(values={"record": {"sample_prompts": ["a\x85b", "\x85", "\u2028"]}})
@given(values=configs)
def test_any_config_is_the_same_after_yaml(values: dict[str, Any]) -> None:
    config = parse_config(values)
    assert load_text(update_text("", config)) == config


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(load_text(text), RunConfig)
    except ConfigError as error:
        assert error.problems


def test_settings_from_the_shell() -> None:
    config = with_settings(
        RunConfig(), ["train.num_steps=40", "data.sources.general=0.25", "model.base=a/b", "train.num_epochs="]
    )
    assert (config.train.num_steps, config.train.num_epochs, config.model.base) == (40, None, "a/b")
    assert config.data.sources == {"identity": 0.5, "general": 0.25}


def test_a_source_has_a_share_or_a_number_of_rows() -> None:
    config = load_text("data: {sources: {identity: 0.5, general: {rows: 2000}}}")
    assert config.data.sources == {"identity": 0.5, "general": RowCount(rows=2000)}
    assert load_text(update_text(preset_text(preset_names()[0]), config)) == config
    assert with_settings(config, ["data.sources.general.rows=30"]).data.sources["general"] == RowCount(rows=30)
    assert with_settings(RunConfig(), ["data.sources.general={rows: 7}"]).data.sources["general"] == RowCount(rows=7)


def test_wrong_settings_from_the_shell_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(), ["num_steps", "nothing.here=1"])
    assert [problem.path for problem in caught.value.problems] == ["num_steps", "nothing.here"]
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(), ["train.num_stepz=1", "lora.rank=0"])
    assert {problem.path for problem in caught.value.problems} == {"train.num_stepz", "lora.rank"}


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(Exception, match="frozen"):
        RunConfig().train.num_steps = 3  # type: ignore[misc]


def test_every_setting_explains_itself() -> None:
    def leaves(model: type, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            deeper = hasattr(inner, "model_fields")
            found += leaves(inner, (*path, name)) if deeper else [(*path, name)]
        return found

    for path in leaves(RunConfig):
        description = field_at(path).description
        assert description and description[0].isalnum() and len(description) > 15, path


def test_an_unknown_preset_is_named_with_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="starter_full, starter_lora, starter_qlora"):
        preset("../../etc/passwd")


def test_gradient_checkpointing_is_auto_or_what_it_always_was() -> None:
    told = {word: load_text(f"train: {{gradient_checkpointing: {word}}}") for word in ("auto", "true", "'no'", "1")}
    assert [each.train.gradient_checkpointing for each in told.values()] == ["auto", True, False, True]
    assert told["'no'"] == RunConfig() and '"gradient_checkpointing":false' in RunConfig().model_dump_json()
    assert problems_of("train: {gradient_checkpointing: never}")["train.gradient_checkpointing"].allowed == (
        "auto, true, false"
    )
    assert {preset(name).train.gradient_checkpointing for name in preset_names()} == {"auto"}
    assert load_text("method: prefix_tuning\ntrain: {gradient_checkpointing: auto}")
