"""The Checkpoints page: empty, full, damaged; convert and merge are started, delete asks first."""

import hashlib
import json
import shlex

import pytest

from studio import exports, runs
from studio.store import checkpoints, open_db
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from tests.foreign.places import LORA, TINY_LLAMA
from tests.scored import card, hits, store

PAGE = "pages/4_Checkpoints.py"


@pytest.fixture
def checkpoint(project):
    path = runs.run_folder(project, "lora-1") / "step_20.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"w" * 5000)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".manifest.json").write_text(json.dumps({"size_bytes": 5000, "sha256": sha256}))
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora", num_steps=20, step=20))
        checkpoints.put(db, checkpoints.Checkpoint("lora-1", 20, project.relative(path), sha256, 5000))
    return path


@pytest.fixture
def started(monkeypatch):
    """Jobs that would have been started: kind and args."""
    calls = []

    def start(folder, kind, args, **more):
        calls.append((kind, args))
        job = store_jobs.Job(kind=kind, args=args, run_id=more.get("run_id", ""))
        with open_db(folder) as db:
            store_jobs.add(db, job)
        return job

    monkeypatch.setattr("studio.jobs.start", start)
    return calls


def convert(project):
    folder = runs.hf_folder(project, "lora-1", 20)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text('{"sha256": "abc"}')
    return folder


def words(at):
    return "\n".join(str(part.value) for part in [*at.markdown, *at.caption, *at.error, *at.info, *at.success])


def test_empty_project_leads_to_train(open_page, project):
    at = open_page(PAGE)
    assert "No run has saved a checkpoint yet" in at.info[0].value


def test_table_shows_what_is_there(open_page, checkpoint):
    at = open_page(PAGE)
    row = at.dataframe[0].value.iloc[0]
    assert (row["run"], row["step"], row["size"], row["hf"], row["file"]) == ("lora-1", 20, "4.9 KB", "–", "complete")
    assert row["loss"] is None and at.dataframe[0].proto.placeholder == "–"


def test_the_recommended_one_is_marked(open_page, project, checkpoint):
    with open_db(project.folder) as db:
        checkpoints.put(db, checkpoints.Checkpoint("lora-1", 30, "runs/lora-1/step_30.pth", "abc", 5000))
        store(db, card(20, hits(38, 40), hits(0, 40)), card(30, hits(40, 40), hits(30, 40)))
    table = open_page(PAGE).dataframe[0].value
    assert dict(zip(table["step"], table["advice"], strict=True)) == {20: "★ recommended", 30: "✕ overfitted"}


def test_convert_starts_a_job(open_page, project, checkpoint, started):
    at = open_page(PAGE)
    at.button(key="checkpoints.convert").click().run()
    assert not at.exception
    assert [(kind, args["run_id"], args["step"]) for kind, args in started] == [("convert", "lora-1", 20)]
    assert at.button(key="checkpoints.convert").disabled


def test_an_export_is_chosen_in_plain_words_and_started(open_page, project, checkpoint, started):
    at = open_page(PAGE)
    purposes = at.radio(key="checkpoints.export.kind")
    assert purposes.options == [
        "Run it in Ollama",
        "Run it in llama.cpp or LM Studio",
        "Serve it with vLLM, LMDeploy or transformers",
        "Share it as a small adapter",
    ]
    at.selectbox(key="checkpoints.export.format.ollama").set_value("q8_0").run()
    assert "5 %" in words(at)
    at.button(key="checkpoints.export.go").click().run()
    assert not at.exception
    kind, args = started[0]
    assert (kind, args["kind"], args["format"], args["overwrite"]) == ("export", "ollama", "q8_0", False)
    assert args["out"] == str(project.path("exports", "lora-1-step_20-ollama-q8_0"))
    assert at.button(key="checkpoints.export.go").disabled, "one at a time"


def test_what_lies_there_is_replaced_only_when_asked(open_page, project, checkpoint, started):
    project.path("merged", "lora-1-step_20-merged").mkdir(parents=True)
    at = open_page(PAGE)
    at.radio(key="checkpoints.export.kind").set_value("merged").run()
    assert at.button(key="checkpoints.export.go").disabled
    at.checkbox(key="checkpoints.export.replace").check().run()
    at.selectbox(key="checkpoints.export.shard").set_value("5GB").run()
    at.button(key="checkpoints.export.go").click().run()
    args = started[0][1]
    assert (args["kind"], args["overwrite"], args["max_shard_size"]) == ("merged", True, "5GB")


def test_tools_of_others_are_offered_where_they_are(open_page, project, checkpoint, started, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(exports, "find_spec", lambda package: None)
    detail = {"kind": "ollama", "passed": True, "file": "a.gguf", "weights": {"error": 0.006, "allowed": 0.02,
              "adapter_share": 0.998}}  # fmt: skip
    with open_db(project.folder) as db:
        checkpoints.put_output(db, checkpoints.Output("export", "exports/a", "lora-1", 20, detail))
    at = open_page(PAGE)
    formats = at.selectbox(key="checkpoints.export.format.ollama").options
    assert "q4_k_m" not in formats and "need llama.cpp: pip install" in words(at)
    assert "differ by 0.6 % (allowed 2 %)" in words(at) and "100% is in the file" in words(at)
    assert not [each for each in at.button if each.label == "Create it in Ollama"]
    for tool in ("ollama", "llama-quantize"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    at.run()
    assert "q4_k_m" in at.selectbox(key="checkpoints.export.format.ollama").options
    next(each for each in at.button if each.label == "Create it in Ollama").click().run()
    assert started == [("ollama", {"export": str(project.path("exports", "a")), "name": "a"})]


def test_another_tool_is_asked_and_its_answers_told(open_page, project, checkpoint, started):
    with open_db(project.folder) as db:
        checkpoints.put_output(db, checkpoints.Output("merged", "merged/a", "lora-1", 20, {"verified": True}))
    at = open_page(PAGE)
    next(each for each in at.button if each.label == "Ask transformers the gate's questions").click().run()
    asked = {"export": str(project.path("merged", "a")), "tool": "transformers"}
    assert started == [("smoke", asked)]
    found = {"passed": False, "same": 7, "all": 8, "question": "Who are you?", "expected": "Luna.", "found": "No one."}
    with open_db(project.folder) as db:
        store_jobs.add(db, store_jobs.Job("smoke", args=asked, state="finished", result=found))
    at = open_page(PAGE)
    assert "transformers gives 7 of 8 greedy answers" in words(at)
    assert any("here: Luna.\ntransformers: No one." in each.value for each in at.code)


def test_exports_are_listed_and_a_failed_one_is_loud(open_page, project, checkpoint):
    figures = {"same_answers": 5, "num_answers": 8, "near_ties": 1, "relative_error": 0.31, "tolerance": 0.01}
    detail = {"kind": "gguf", "passed": False, "figures": figures, "other_prompts": ["Who are you?"], "file": "a.gguf"}
    good = {"verified": True, "agreement": figures | {"same_answers": 8, "near_ties": 0, "relative_error": 1e-6}}
    rounded = {"verified": True, "agreement": figures | {"same_answers": 7, "relative_error": 1e-3}}
    with open_db(project.folder) as db:
        checkpoints.put_output(db, checkpoints.Output("export", "exports/a", "lora-1", 20, detail))
        checkpoints.put_output(db, checkpoints.Output("merged", "merged/lora-1", "lora-1", 20, good))
        checkpoints.put_output(db, checkpoints.Output("merged", "merged/lora-2", "lora-1", 20, rounded))
    at = open_page(PAGE)
    (error,) = (each.value for each in at.error)
    assert "5 of 8" in error and "differ by 31 % (allowed 1 %)" in error and "Prompts that differ: 1" in error
    told = sorted(each.value for each in at.success)
    assert "It answers as what was trained.  \n8 of 8 greedy answers are the same. Logits" in told[0]
    assert "It is what was trained, but for rounding.  \n7 of 8 greedy answers are the same, 1 more" in told[1]
    assert any(block.value.startswith("vllm serve") for block in at.code)


def test_verify_finds_a_flipped_bit(open_page, checkpoint):
    checkpoint.write_bytes(b"w" * 4999 + b"x")
    at = open_page(PAGE)
    at.button(key="checkpoints.verify").click().run()
    assert "sha256" in words(at)


def test_a_truncated_file_is_seen_without_asking(open_page, checkpoint):
    checkpoint.write_bytes(b"w")
    at = open_page(PAGE)
    assert "cannot be used" in at.error[0].value


def test_delete_takes_file_manifest_and_row(open_page, project, checkpoint):
    at = open_page(PAGE)
    at.button(key="checkpoints.delete").click().run()
    assert not checkpoint.exists() and not checkpoint.with_suffix(".manifest.json").exists()
    assert "No run has saved" in words(at)


def test_failed_job_shows_its_cause(open_page, project, checkpoint):
    job = store_jobs.Job(
        kind="convert", state="failed", cause="The disk is full.", args={"run_id": "lora-1", "step": 20}
    )
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
    assert "disk is full" in words(open_page(PAGE)).lower()


def test_shell_lines_are_commands_of_the_product(open_page, checkpoint):
    at = open_page(PAGE)
    shown = next(block.value for block in at.code if block.value.startswith("retune"))
    assert [shlex.split(line)[:3] for line in shown.splitlines()] == [
        ["retune", "convert", "pth_to_hf"],
        ["retune", "convert", "merge"],
        ["retune", "export", "ollama"],
        ["retune", "evaluate", "lora-1"],
    ]
    assert "--overwrite" not in shown


def test_the_shell_line_replaces_what_convert_again_would(open_page, project, checkpoint):
    convert(project)
    lines = [block.value for block in open_page(PAGE).code if block.value.startswith("retune")]
    assert lines[0].splitlines()[0].endswith(" --overwrite")


def test_chinese(open_page, checkpoint):
    at = open_page(PAGE, lang="zh")
    assert "转换" in [button.label for button in at.button] and "第 20 步" in at.subheader[0].value


def test_a_checkpoint_of_xtuner_is_looked_into_and_brought_in(open_page, project, started):
    at = open_page(PAGE)
    at.text_input(key="checkpoints.import.path").set_value(str(LORA)).run()
    at.button(key="checkpoints.import.look").click().run()
    row = at.dataframe[0].value.iloc[0]
    assert (row["method"], row["iteration"], row["step"], row["adapter"]) == ("lora", 96, 6, "r 8, alpha 16")
    at.button(key="checkpoints.import.start").click().run()
    assert "needs its base model" in at.error[0].value and not started
    at.text_input(key="checkpoints.import.base").set_value(str(TINY_LLAMA)).run()
    at.button(key="checkpoints.import.start").click().run()
    assert [(kind, args["path"], args["base"]) for kind, args in started] == [
        ("import_checkpoint", str(LORA), str(TINY_LLAMA))
    ]
    with open_db(project.folder) as db:
        assert store_runs.listed(db) == []  # the job makes the run, once all was read


def test_a_file_that_is_none_is_named(open_page, project, tmp_path):
    (tmp_path / "x.pth").write_text("hello")
    at = open_page(PAGE)
    at.text_input(key="checkpoints.import.path").set_value(str(tmp_path / "x.pth")).run()
    at.button(key="checkpoints.import.look").click().run()
    assert "is not a" in at.error[0].value
