"""`retune data`: build, import, inspect, check and delete datasets."""

import json
from pathlib import Path

import pytest
from pytest import MonkeyPatch

from tests.cli.conftest import Retune

XTUNER = Path(__file__).parents[1] / "data" / "fixtures" / "xtuner"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture(autouse=True)
def a_project(project: object) -> None:
    """Every command here works on the newest project."""


def test_identity_builds_rows_and_probes(retune: Retune) -> None:
    said = retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 30, "--languages", "en,zh")
    assert said.startswith("identity: 30 rows, ") and "held-out probes" in said
    (built,) = json.loads(retune("data", "list", "--json"))
    assert (built["kind"], built["num_rows"]) == ("identity", 30)
    assert built["num_probes"] > 20


def test_identity_warns_of_a_name_that_cannot_be_measured(retune: Retune) -> None:
    assert "'Hi' is a word that ordinary answers use too" in retune(
        "data", "identity", "--name", "Hi", "--maker", "Shane"
    )
    assert "ordinary" not in retune("data", "identity", "--name", "Sam", "--maker", "Shane")


def test_tutorial_repeats_its_rows(retune: Retune) -> None:
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--tutorial", 4)
    assert "tutorial" in retune("data", "list")
    assert "duplicate" in retune("data", "lint", "tutorial")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "", "--maker", "Shane"], "The name is empty"),
        (["--name", "Luna", "--maker", "<|im_end|>"], "maker"),
        (["--name", "Luna", "--maker", "Shane", "--languages", "fr"], "en, zh or both"),
        (["--name", "Luna", "--maker", "Shane", "--dataset", "../x"], "cannot name a dataset"),
    ],
)
def test_what_cannot_be_built_is_said(words: list[str], said: str, retune: Retune) -> None:
    assert said in retune("data", "identity", *words, code=1)
    assert "No datasets yet" in retune("data", "list")


def test_import_names_bad_rows_and_can_leave_them_out(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "Chats of June.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"x": 1}\nnot json\n', encoding="utf-8")
    said = retune("data", "import", file, code=1)
    assert "row 2" in said and "row 3" in said
    assert retune("data", "import", file, "--keep-good").startswith("chats-of-june: 1 row")


def test_import_of_alpaca_by_name(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps([{"instruction": "Say ho.", "input": "", "output": "ho"}]), encoding="utf-8")
    assert retune("data", "import", file, "--dataset", "small", "--format", "alpaca") == "small: 1 row\n"
    assert "no file" in retune("data", "import", tmp_path / "nothing.json", code=1)


def test_inspect_marks_the_trained_tokens(retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(GOOD), encoding="utf-8")
    retune("data", "import", file)
    assert "[ho⟦<|im_end|>⟧]" in retune("data", "inspect", "in", "--base", tiny_model)
    life = json.loads(retune("data", "inspect", "in", "--base", tiny_model, "--json"))
    assert len(life["input_ids"]) == len(life["labels"])
    assert {label for label in life["labels"] if label != -100} < set(life["input_ids"])
    assert [token["trained"] for token in life["tokens"]] == [label != -100 for label in life["labels"]]
    assert "no row 2" in retune("data", "inspect", "in", "--row", 2, "--base", tiny_model, code=1)
    assert "no dataset 'out'" in retune("data", "inspect", "out", "--base", tiny_model, code=1)


def test_inspect_tells_a_control_token_from_text_that_looks_like_one(
    retune: Retune, tmp_path: Path, tiny_model: Path
) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"question": "say <|im_end|> now", "answer": "ho"}), encoding="utf-8")
    said = retune("data", "inspect", file, "--base", tiny_model)
    assert "say <|im_end|> now⟦<|im_end|>⟧" in said and "⟦ ⟧ holds a control token" in said


def test_inspect_reads_columns_by_hand(retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "asked.csv"
    file.write_text("Drug,Asked,Said\nx,how much?,ask a doctor\n", encoding="utf-8")
    said = retune("data", "inspect", file, "--base", tiny_model, code=1)
    assert "--columns question=" in said
    said = retune("data", "inspect", file, "--columns", "question=Asked,answer=Said", "--base", tiny_model)
    assert "user: how much?" in said and "assistant: ask a doctor" in said
    words = ("--columns", "question=Asked,answer=Told", "--base", tiny_model)
    assert "no column 'Told'" in retune("data", "inspect", file, *words, code=1)


def test_inspect_begins_with_the_raw_row(retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    """As the source has it, from the file and from the dataset; what no source has says so."""
    raw = {"instruction": "Say ho.", "input": "", "output": "<b>ho</b>", "id": "x" * 3_000}
    file = tmp_path / "alpaca.jsonl"
    file.write_text("\n\n".join(map(json.dumps, [raw, raw, raw | {"output": "hi"}])), encoding="utf-8")
    retune("data", "import", file)
    for source in (file, "alpaca"):
        life = json.loads(retune("data", "inspect", source, "--row", 3, "--base", tiny_model, "--json"))
        assert life["raw"] == raw | {"output": "hi"} and life["raw_source"] == "alpaca.jsonl"
        assert life["raw_places"] == [{"file": "", "row": 3, "line": 5}]
    said = retune("data", "inspect", "alpaca", "--base", tiny_model)
    assert said.startswith('Raw row: alpaca.jsonl, row 1 and 1 equal ones\n{\n  "instruction": "Say ho."')
    assert "<b>ho</b>" in said and "x… and 1,000 characters more" in said
    retune("data", "fix", "alpaca", "--rule", "duplicate")
    assert retune("data", "inspect", "alpaca", "--row", 2, "--base", tiny_model).startswith(
        "Raw row: alpaca.jsonl, row 3 (line 5)\n"
    )
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 5)
    assert retune("data", "inspect", "identity", "--base", tiny_model).startswith("Raw row: none; the studio made")


def test_inspect_shows_characters_that_several_tokens_make(retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "zh.csv"
    file.write_text("问题,答案\n你是谁？,我是露娜。\n", encoding="utf-8")
    said = retune("data", "inspect", file, "--base", tiny_model)
    assert "\ufffd" not in said and "[我是露娜。" in said
    retune("data", "import", file)
    assert "no rule 'nosuch'" in retune("data", "fix", "zh", "--rule", "nosuch", code=1)


def test_lint_fails_on_errors(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    bad = {
        "messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am {{NAME}}."}]
    }
    file.write_text(json.dumps(bad), encoding="utf-8")
    retune("data", "import", file)
    assert "placeholder" in retune("data", "lint", "bad", code=1)
    assert json.loads(retune("data", "lint", "bad", "--json", code=1))[0]["row"] == 1


def test_delete_asks_first(retune: Retune) -> None:
    retune("data", "identity", "--name", "Luna", "--maker", "Shane", "--rows", 5)
    retune("data", "delete", "identity", answer="n\n", code=1)
    assert "identity" in retune("data", "list")
    retune("data", "delete", "identity", "--yes")
    assert "No datasets yet" in retune("data", "list")
    assert "no dataset" in retune("data", "delete", "identity", "--yes", code=1)


def test_inspect_of_a_bare_file_needs_no_project(retune: Retune, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path / "empty"))
    golden = json.loads((XTUNER / "golden_templates.json").read_text(encoding="utf-8"))
    file = tmp_path / "rows.jsonl"
    rows = [{"conversation": turns} for turns in golden["conversations"].values()]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ("data", "inspect", file, "--tokenizer", XTUNER / "tokenizer", "--json")
    for number, case in enumerate(golden["conversations"], start=1):
        for name, expected in (("qwen_chat", golden["templates"]["qwen_chat"]), ("none", golden["no_template"])):
            life = json.loads(retune(*words, "--row", number, "--template", name))
            assert life["text"] == expected[case]["rendered_text"]
            assert life["input_ids"] == expected[case]["input_ids"]
            assert life["labels"] == expected[case]["labels"]
    cut = json.loads(retune(*words, "--row", 2, "--template", "internlm2_chat", "--max-length", 24))
    expected = golden["truncated_max_length_24"]["internlm2_chat"]["multi_turn"]
    assert (cut["text"], cut["labels"], cut["truncated"]) == (expected["rendered_text"], expected["labels"], True)
    assert "has no row 99" in retune(*words, "--row", 99, code=1)
    assert "no template named 'x'" in retune(*words, "--template", "x", code=1)
    assert "no project yet" in retune("data", "inspect", "chats", code=1)


def test_inspect_shows_what_a_map_gives(retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "sql.json"
    rows = [{"context": "CREATE TABLE t", "question": "How many?", "answer": "SELECT COUNT(*) FROM t"}, {"text": "hi"}]
    file.write_text(json.dumps(rows), encoding="utf-8")
    words = ("data", "inspect", file, "--tokenizer", XTUNER / "tokenizer", "--template", "default")
    life = json.loads(retune(*words, "--format", "sql", "--json"))
    [turn] = life["conversation"]
    assert turn["input"] == "CREATE TABLE t\nHow many?" and turn["output"] == "SELECT COUNT(*) FROM t"
    assert life["text"].startswith("<s><|System|>:If you are an expert in SQL")
    assert "[SELECT COUNT(*) FROM t⟦</s>⟧]" in retune(*words, "--format", "sql")
    assert "no column 'context'" in retune(*words, "--format", "sql", "--row", 2, code=1)
    text = json.loads(retune(*words, "--row", 2, "--json"))
    assert text["text"] == "hi</s>" and text["labels"] == text["input_ids"]


def test_inspect_of_a_row_with_megabytes(retune: Retune, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "big.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "word " * 40_000}), encoding="utf-8")
    said = retune("data", "inspect", file, "--base", tiny_model)
    assert len(said) < 40_000 and "more; --json has all of them" in said
    cut = json.loads(retune("data", "inspect", file, "--base", tiny_model, "--max-length", 32, "--json"))
    assert cut["truncated"] and len(cut["input_ids"]) == 32 and len(cut["raw"]["answer"]) == 200_000
    assert "more cut off" in retune("data", "inspect", file, "--base", tiny_model, "--max-length", 32)
