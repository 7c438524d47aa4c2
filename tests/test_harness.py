"""Tasks of lm-evaluation-harness: plain values and local rows are taken; what would run code or fetch is refused."""

import json
from pathlib import Path

import pytest

from studio import harness
from studio.errors import DataError, JobError, ProjectError
from studio.harness_tasks import read_tasks
from studio.projects import Project
from studio.store import checkpoints, open_db

ROWS = "".join(
    json.dumps({"question": f"Is {number} even?", "choices": ["yes", "no"], "answer": number % 2}) + "\n"
    for number in range(6)
)
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files: {test: rows.jsonl}\ntest_split: test\n"
TASK = COMMON + (
    "task: even\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    (folder / "even.yaml").write_text(TASK, encoding="utf-8")
    return folder


def test_rows_lie_beside_the_task_and_includes_are_followed(folder: Path) -> None:
    (folder / "_common.yaml").write_text(COMMON)
    (folder / "says.yaml").write_text("include: _common.yaml\ntask: says\ntest_split: other\n")
    even, says = read_tasks(folder)
    assert [even["task"], says["task"]] == ["even", "says"]
    assert says["dataset_kwargs"] == {"data_files": {"test": str(folder / "rows.jsonl")}}
    assert says["test_split"] == "other" and "include" not in says and "_file" not in says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TASK + "process_docs: !function utils.run\n", "uses !function, which would run Python code"),
        (TASK + "class: !function evil.Task\n", "uses !function"),
        (TASK + "class: evil.Task\n", "uses class"),
        (TASK + "custom_dataset: evil\n", "uses custom_dataset"),
        (TASK + "x: !!python/object/apply:os.system ['true']\n", "is not plain YAML"),
        (TASK.replace("metric: acc", "metric: ./evil.py"), "uses the metric './evil.py'"),
        (TASK.replace("metric: acc", "metric: rouge\n    hf_evaluate: true"), "uses hf_evaluate"),
        (TASK.replace("dataset_path: json", "dataset_path: owner/name"), "are 'owner/name' of a hub"),
        (TASK.replace("rows.jsonl", "gone.jsonl"), "'gone.jsonl' of even.yaml are not there"),
        ("include: even.yaml\n", "includes files in a circle"),
        ("include: gone.yaml\ntask: a\n", "includes 'gone.yaml', which is not there"),
        ("task: 3\n", "There is no task"),
        ("[" * 1000, "is not plain YAML"),
    ],
)
def test_what_needs_code_or_the_network_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "even.yaml").write_text(text)
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        read_tasks(folder)


def test_rows_outside_the_folder_are_not_read(folder: Path) -> None:
    (folder.parent / "secret.jsonl").write_text(ROWS)
    (folder / "even.yaml").write_text(TASK.replace("rows.jsonl", "../secret.jsonl"))
    with pytest.raises(ProjectError, match="leads outside"):
        read_tasks(folder)


def test_without_the_extra_it_says_what_to_install(folder: Path, project: Project, monkeypatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(JobError, match="not installed") as raised:
        harness.start(project, "lora-1", 20, folder)
    assert 'pip install "retune[lm-eval]"' in raised.value.hint


def test_the_newest_result_of_a_task_is_read_with_its_change_paired(project: Project) -> None:
    def side(marks: list[float]) -> dict:
        metric = {"value": sum(marks) / len(marks), "stderr": 0.1, "marks": marks}
        return {"num_rows": len(marks), "metrics": {"acc": metric, "loss": {"value": 1.5, "stderr": None, "marks": []}}}

    with open_db(project.folder) as db:
        for number, tuned in enumerate(([0.0] * 4, [1.0, 1.0, 1.0, 0.0])):
            detail = {"results": {"even": {"base": side([1.0, 0.0, 0.0, 0.0]), "tuned": side(tuned)}}}
            output = checkpoints.Output("lm_eval", f"reports/lm_eval/{number}.json", "lora-1", 20, detail)
            checkpoints.put_output(db, output)
    acc, loss = harness.results(project, ["lora-1"])
    assert acc.tuned == pytest.approx((0.75, 0.75 - 0.196, 0.75 + 0.196), abs=1e-4) and acc.num_rows == 4
    assert acc.change[0] == pytest.approx(0.5) and acc.change[1] < 0.5 < acc.change[2]
    assert (loss.base, loss.change) == (1.5, None)
    assert harness.results(project, ["other"]) == []
