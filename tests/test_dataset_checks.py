"""Lint results are kept until something changes; errors block a start; fixes and runs know their versions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from studio import dataset_checks, datasets, runs
from studio.config.catalog import preset
from studio.config.schema import RunConfig
from studio.config.yaml import with_settings
from studio.data.conversation import Conversation, Message
from studio.data.lint import check
from studio.data.lint.findings import Finding, LintResult
from studio.dataset_checks import Tokens, fix, lint_dataset
from studio.errors import DataError
from studio.projects import Project
from studio.store import checks, lint_results, open_db
from tests.engine.conftest import tiny_model

__all__ = ["tiny_model"]


def row(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


ROWS = [row("q0", "a0"), row("q1", "I am {{NAME}}."), row("q2", "a2 "), row("q0", "a0"), row("q0", "a0")]


@pytest.fixture
def mine(project: Project) -> Project:
    datasets.save(project, "mine", ROWS, kind="import")
    return project


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time the rows are really looked at: whether it was a quick look."""
    looks: list[bool] = []
    real: Callable[..., LintResult] = checks.lint

    def counting(*args: object, **options: object) -> LintResult:
        looks.append(bool(options["quick"]))
        return real(*args, **options)

    monkeypatch.setattr(checks, "lint", counting)
    return looks


def rules(result: LintResult) -> list[tuple[int, str]]:
    return [(finding.row, finding.rule) for finding in result.findings]


def config_for(model: Path) -> RunConfig:
    return with_settings(preset("starter_lora"), [f"model.base={model}", "data.sources={mine: 1}", "name=tiny"])


def test_a_result_is_kept_until_the_rows_change(mine: Project, counted: list[bool]) -> None:
    first = lint_dataset(mine, "mine")
    assert rules(first) == [(1, "duplicate"), (2, "placeholder"), (3, "outer_space")]
    assert lint_dataset(mine, "mine") == first and counted == [False]
    datasets.edit_row(mine, "mine", 2, row("q1", "I am Luna."), 1)
    assert rules(lint_dataset(mine, "mine")) == [(1, "duplicate"), (3, "outer_space")] and len(counted) == 2
    datasets.undo(mine, "mine")
    assert lint_dataset(mine, "mine") == first and len(counted) == 2


def test_probes_of_other_datasets_count_and_a_new_one_is_seen(mine: Project) -> None:
    lint_dataset(mine, "mine")
    probes = [{"messages": [{"role": "user", "content": "Q2?"}], "kind": "general"}]
    datasets.save(mine, "general", [row("x", "y")], "general", probes=probes)
    assert (3, "probe_in_training") in rules(lint_dataset(mine, "mine"))


def test_tokens_are_looked_at_with_the_settings_of_the_run(mine: Project, tiny_model: Path) -> None:
    datasets.save(mine, "mine", [row("q", "long " * 300 + "end.")], kind="import")
    assert rules(lint_dataset(mine, "mine", Tokens(str(tiny_model), max_length=64))) == [(1, "truncated")]
    assert rules(lint_dataset(mine, "mine", Tokens(str(tiny_model), max_length=4000))) == []


def test_old_results_are_dropped(mine: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_results, "KEPT_RESULTS", 3)
    with open_db(mine.folder) as db:
        for number in range(5):
            lint_results.put(db, str(number), "mine", LintResult([Finding(number, "error", "secret", "…", "", (2, 3))]))
        assert [bool(lint_results.find(db, str(number))) for number in range(5)] == [False, False, True, True, True]
        known = lint_results.find(db, "4")
        assert known and known.findings == [Finding(4, "error", "secret", "…", "", (2, 3))]


def test_a_fix_is_a_version_and_says_what_it_did(mine: Project) -> None:
    found = {finding.rule: finding for finding in lint_dataset(mine, "mine").findings}
    done = fix(mine, "mine", found["duplicate"])
    assert done.version == 2 and done.num_rows == 3
    assert "row 1 (duplicate): keep the first" in datasets.versions(mine, "mine")[0].made_by
    with pytest.raises(DataError, match="at version 2 by now"):
        fix(mine, "mine", found["outer_space"], expected_version=1)
    with pytest.raises(DataError, match="no safe fix"):
        fix(mine, "mine", found["placeholder"])
    with pytest.raises(DataError, match="Nothing to fix"):
        fix(mine, "mine", [])
    assert datasets.get(mine, "mine").version == 2


def test_errors_block_a_start_and_the_override_is_recorded(
    mine: Project, tiny_model: Path, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_start_training", lambda *args, **options: None)
    config = config_for(tiny_model)
    with pytest.raises(DataError, match=r"mine, row 2: Message 2 still has the placeholder(.|\n)*--allow-lint-errors"):
        runs.start_run(mine, config)
    assert runs.list_runs(mine) == [] and counted == [True]
    run, _ = runs.start_run(mine, config, allow_lint_errors=True)
    dataset = datasets.get(mine, "mine")
    assert run.detail["datasets"] == {"mine": {"version": 1, "fingerprint": dataset.fingerprint}}
    [despite] = run.detail["started_despite"]
    assert despite.startswith("mine, row 2:") and counted == [True]
    datasets.edit_row(mine, "mine", 2, row("q1", "I am Luna."), 1)
    run, _ = runs.start_run(mine, config)
    assert "started_despite" not in run.detail and run.detail["datasets"]["mine"]["version"] == 2


def test_a_full_check_that_was_made_counts_at_the_start(
    mine: Project, tiny_model: Path, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_start_training", lambda *args, **options: None)
    datasets.save(mine, "mine", [row("why " * 800, "a.")], kind="import")
    config = config_for(tiny_model)
    lint_dataset(mine, "mine", dataset_checks.tokens_of(config))
    with pytest.raises(DataError, match="No token of this row is trained"):
        runs.start_run(mine, config)
    assert counted == [False]


@pytest.mark.parametrize("looked_before", [False, True])
def test_errors_of_tokens_block_a_start_that_nobody_checked_for(
    mine: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, looked_before: bool
) -> None:
    """A look at the text alone, made before, does not stand for them."""
    monkeypatch.setattr(runs, "_start_training", lambda *args, **options: None)
    call = json.dumps([{"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}])
    calling = Conversation((Message("user", "What time is it?"), Message("assistant", "", tool_calls=call)))
    datasets.save(mine, "mine", [row("Hello?", "Hi."), calling], kind="import")
    if looked_before:
        assert not lint_dataset(mine, "mine").num_errors
    with pytest.raises(DataError, match="mine, row 2: The chat template leaves out the call of a tool"):
        runs.start_run(mine, config_for(tiny_model))
    datasets.save(mine, "mine", [row("why " * 800, "a.")], kind="import")
    with pytest.raises(DataError, match="No token of this row is trained"):
        runs.start_run(mine, config_for(tiny_model))


def test_a_quick_look_encodes_the_first_rows(mine: Project, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BATCH_ROWS", 2)
    monkeypatch.setattr(check, "ENCODED_WHEN_QUICK", 2)
    datasets.save(mine, "mine", [row("why " * 800, f"a{n}.") for n in range(6)], kind="import")
    tokens = Tokens(str(tiny_model))
    assert rules(lint_dataset(mine, "mine", tokens, quick=True)) == [(n, "no_trained_tokens") for n in (1, 2)]
    assert len([one for one in rules(lint_dataset(mine, "mine", tokens)) if one[1] == "no_trained_tokens"]) == 6


def test_many_errors_are_counted(mine: Project, tiny_model: Path) -> None:
    datasets.save(mine, "mine", [row(str(number), "I am {{NAME}}.") for number in range(50)], kind="import")
    errors = dataset_checks.errors_before_start(mine, config_for(tiny_model))
    assert len(errors) == 21 and errors[-1] == "mine: 30 more errors"


def test_report_with_and_without_tokens(mine: Project, tiny_model: Path) -> None:
    plain = dataset_checks.report(mine, "mine")
    assert (plain.num_rows, plain.num_duplicates, plain.lengths) == (5, 2, {})
    seen: list[tuple[int, int]] = []
    full = dataset_checks.report(mine, "mine", Tokens(str(tiny_model)), lambda *done: seen.append(done))
    assert full.lengths["longest"] > full.lengths["shortest"] > 0 and 0 < full.trained_share < 1 and seen == [(5, 5)]
