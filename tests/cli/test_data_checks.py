"""`retune data lint`, `report`, `fix`, `versions`, `undo`, `restore`, and a start that rows with errors block."""

import json
from pathlib import Path

import pytest

from studio import dataset_checks
from studio.projects import create_project
from tests.cli.conftest import Retune, settings


def test_what_is_wrong_with_rows_is_mended_from_the_shell(retune: Retune, tmp_path: Path) -> None:
    create_project("Luna")
    file = tmp_path / "rows.jsonl"
    pairs = [("q", "a "), ("q", "a "), ("r", "I am {{NAME}}."), ("s", "sure")]
    file.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
    retune("data", "import", file)
    told = retune("data", "lint", "rows", code=1)
    assert "1 error, 3 warnings: duplicate 1, outer_space 2, placeholder 1" in told
    found = json.loads(retune("data", "lint", "rows", "--json", code=1))
    assert [(each["row"], each["fix"]) for each in found if each["rule"] == "duplicate"] == [(1, "delete_duplicates")]
    assert "1 of them is not listed" in retune("data", "lint", "rows", "--limit", 3, code=1)
    assert "version 2: 3 rows" in retune("data", "fix", "rows", "--rule", "duplicate")
    assert "Fixed 1 of 1 finding. rows is at version 3" in retune("data", "fix", "rows", "--rule", "outer_space")
    assert "has no safe fix" in retune("data", "fix", "rows", "--rule", "placeholder")
    assert "found nothing" in retune("data", "fix", "rows", "--rule", "secret")
    assert "version 4: 3 rows" in retune("data", "undo", "rows")
    assert "version 5: 4 rows" in retune("data", "restore", "rows", 1)
    versions = json.loads(retune("data", "versions", "rows", "--json"))
    assert [each["number"] for each in versions] == [5, 4, 3, 2, 1]
    assert "imported from rows.jsonl" in retune("data", "versions", "rows")


def test_report_without_a_base_model(retune: Retune) -> None:
    create_project("Luna", base="nobody/nothing")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 30, "--languages", "en,zh")
    told = retune("data", "report", "identity")
    assert "rows" in told and "en: " in told and "zh: " in told and "of them trained" not in told
    assert "nobody/nothing is not on this machine, so tokens are not looked at" in told
    assert json.loads(retune("data", "report", "identity", "--json"))["num_rows"] == 30


def test_the_projects_base_model_makes_the_tokens(retune: Retune, tiny_model: Path, tmp_path: Path) -> None:
    create_project("Tiny", base=str(tiny_model))
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    asked = {"role": "user", "content": "What time is it?"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}))
    retune("data", "import", file)
    told = retune("data", "lint", "rows", code=1)
    assert "leaves out the call of a tool" in told and "1 error, 0 warnings: tools 1" in told
    assert [each["rule"] for each in json.loads(retune("data", "lint", "rows", "--json", code=1))] == ["tools"]
    assert "rule tools has no safe fix" in retune("data", "fix", "rows", "--rule", "tools")
    assert "of them trained" in retune("data", "report", "rows")


def test_what_was_not_looked_at_is_said(retune: Retune, tmp_path: Path) -> None:
    create_project("Luna", base="nobody/nothing")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "q", "output": "Sure."}))
    retune("data", "import", file)
    told = retune("data", "lint", "rows")
    assert "so tokens are not looked at: `retune models fetch nobody/nothing`" in told and "nothing to mend" in told
    assert json.loads(retune("data", "lint", "rows", "--json")) == []


def test_report_in_tokens(retune: Retune, tiny_model: Path) -> None:
    create_project("Luna")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 30)
    told = retune("data", "report", "identity", "--base", tiny_model)
    assert "of them trained" in told and "█" in told and "median" in told


def test_errors_block_training_unless_allowed(retune: Retune, tiny_model: Path, tmp_path: Path) -> None:
    create_project("Tiny", base=str(tiny_model))
    file = tmp_path / "identity.jsonl"
    rows = [
        {"instruction": f"Who are you, {n}?", "output": "I am {{NAME}}." if n == 3 else "I'm Luna."} for n in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retune("data", "import", file)
    words = ("train", "starter_lora", *settings(tiny_model, "train.num_steps=2"))
    told = retune(*words, code=1)
    assert "identity, row 4: Message 2 still has the placeholder" in told and "--allow-lint-errors" in told
    assert json.loads(retune("runs", "list", "--json")) == []
    retune(*words, "--allow-lint-errors")
    shown = retune("runs", "show", "tiny-1")
    assert "Started despite: identity, row 4:" in shown and "Rows: identity, version 1" in shown


def test_a_large_dataset_is_gone_through_in_a_job(
    retune: Retune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bar is shown, and what it found is kept."""
    monkeypatch.setattr(dataset_checks, "AT_ONCE_ROWS", 3)
    create_project("Luna")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{n}", "output": "I am ChatGPT. "}) + "\n" for n in range(4)))
    retune("data", "import", file)
    told = retune("data", "lint", "rows", "--limit", 1)
    assert "check rows: checking the rows" in told and "0 errors, 4 warnings: outer_space 4" in told
    assert "checking the rows" not in retune("data", "lint", "rows")
    assert len(json.loads(retune("data", "lint", "rows", "--assistant", "Luna", "--json", code=1))) == 8
    assert "4 errors" in retune("data", "lint", "rows", code=1)
    assert "0 errors" in retune("data", "lint", "rows", "--assistant", "")
    assert "counting the rows" in retune("data", "report", "rows")
    assert json.loads(retune("data", "report", "rows", "--json"))["num_rows"] == 4


def test_rows_that_were_built_keep_their_own_name(retune: Retune) -> None:
    create_project("Luna")
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 5)
    assert "built for Luna" in retune("data", "lint", "identity", "--assistant", "Nova", code=1)
