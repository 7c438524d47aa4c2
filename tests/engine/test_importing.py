"""The import job: any source becomes a dataset, with progress; a stop or a bad row leaves everything as it was."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from studio import datasets, jobs
from studio.data.files import ReadOptions
from studio.data.raw_rows import RawRows
from studio.engine import hub_data, importing
from studio.engine.hub_data import hub_rows
from studio.engine.job import StopRequested
from studio.errors import DataError
from studio.projects import Project

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in range(40)]


class Watched:
    """Stands for a job at hand: its arguments, and what it was told."""

    def __init__(self, project: Project, stop_after: int = 10**9, **args: Any) -> None:
        self.folder, self.args, self.id = project.folder, args, "job"
        self.phases: list[tuple[str, int, str]] = []
        self.done: list[int] = []
        self.looks, self.stop_after = 0, stop_after

    def phase(self, phase: str, total: int = 0, unit: str = "", current: int = 0) -> None:
        self.phases.append((phase, total, unit))

    def progress(self, current: int, total: int | None = None, unit: str | None = None) -> None:
        self.done.append(current)

    def check_stop(self) -> None:
        self.looks += 1
        if self.looks > self.stop_after:
            raise StopRequested(save=True)


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_job_imports_what_the_page_imports_at_once(project: Project, tmp_path: Path) -> None:
    path = lines(tmp_path / "Chats of June.jsonl", ROWS)
    job = datasets.start_import(project, path)
    *_, ended = jobs.watch(project.folder, job.id)
    assert (ended.state, ended.current, ended.total, ended.unit) == (
        "finished", path.stat().st_size, path.stat().st_size, "bytes",
    ), ended.cause  # fmt: skip
    assert ended.result == {"dataset": "chats-of-june", "num_rows": 40, "num_left_out": 0}
    by_job = datasets.get(project, "chats-of-june")
    at_once = datasets.import_file(project, path, "second")
    assert by_job.fingerprint == at_once.fingerprint and by_job.kind == at_once.kind == "import"
    assert by_job.origin == at_once.origin | {"raw": by_job.origin["raw"], "job_id": job.id}
    kept = RawRows(project.path(by_job.origin["raw"]))
    assert all(kept.find(row).rows for row in datasets.stream(project, "chats-of-june"))
    assert by_job.origin["source"] == "data/source/chats-of-june.jsonl"
    assert project.path(by_job.origin["source"]).read_bytes() == path.read_bytes()
    assert [row.messages[1].content for row in datasets.load(project, "second")] == [row["output"] for row in ROWS]


def test_bad_rows_are_named_and_nothing_changes(project: Project, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [*ROWS, {"x": 1}, *ROWS, []])
    job = Watched(project, path=str(path), name="mine")
    with pytest.raises(DataError, match="a.jsonl: 2 of 82 rows") as caught:
        importing.run(job)  # type: ignore[arg-type]
    assert "row 41:" in str(caught.value) and "row 82:" in str(caught.value)
    assert datasets.listed(project) == [] and not project.path("data", "mine.jsonl").exists()
    job.args["keep_good"] = True
    assert importing.run(job) == {"dataset": "mine", "num_rows": 80, "num_left_out": 2}  # type: ignore[arg-type]


def test_no_good_row_is_an_error_even_when_good_ones_are_kept(project: Project, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"x": 1}, {"y": []}])
    with pytest.raises(DataError, match="2 of 2 rows"):
        importing.run(Watched(project, path=str(path), name="mine", keep_good=True))  # type: ignore[arg-type]


def test_a_stop_leaves_the_dataset_as_it_was(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "STOP_CHECK_SECONDS", -1.0)
    before = datasets.import_file(project, lines(tmp_path / "old.jsonl", ROWS[:3]), "mine")
    path = lines(tmp_path / "new.jsonl", ROWS * 50)
    job = Watched(project, stop_after=4, path=str(path), name="mine")
    with pytest.raises(StopRequested):
        importing.run(job)  # type: ignore[arg-type]
    assert datasets.get(project, "mine") == before and len(datasets.load(project, "mine")) == 3
    assert 0 < max(job.done) <= path.stat().st_size and ("reading", path.stat().st_size, "bytes") in job.phases


def test_a_source_is_never_changed(project: Project, tmp_path: Path) -> None:
    first = datasets.import_file(project, lines(tmp_path / "my" / "a" / "chats.jsonl", ROWS[:1]), "one")
    again = datasets.import_file(project, lines(tmp_path / "my" / "a" / "chats.jsonl", ROWS[:1]), "two")
    other = datasets.import_file(project, lines(tmp_path / "my" / "b" / "chats.jsonl", ROWS[:2]), "three")
    assert first.origin["source"] == again.origin["source"] == "data/source/chats.jsonl"
    assert other.origin["source"] == "data/source/chats-2.jsonl"
    folder = datasets.import_file(project, tmp_path / "my", "four")
    assert folder.num_rows == 3
    assert sorted(p.name for p in project.path(folder.origin["source"]).rglob("*.jsonl")) == ["chats.jsonl"] * 2


def test_columns_sheet_and_format_reach_the_job(project: Project, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("提,回\n你好,好\n".encode("gb18030"))
    args = {"path": str(path), "name": "mine", "columns": "question=提,answer=回", "encoding": "gb18030"}
    assert importing.run(Watched(project, **args))["num_rows"] == 1  # type: ignore[arg-type]
    assert datasets.get(project, "mine").origin["columns"] == "question=提,answer=回"
    for wrong in ({"format": "alpacca"}, {"columns": "question=a"}):
        with pytest.raises(DataError):
            datasets.start_import(project, path, **wrong)
    with pytest.raises(DataError, match="no file"):
        datasets.start_import(project, tmp_path / "none.csv", options=ReadOptions())


def parquet_folder(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(ROWS[:30]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[30:]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# About\n", encoding="utf-8")


def saved_folder(folder: Path) -> None:
    parts = {"train": Dataset.from_list(ROWS[:30]), "test": Dataset.from_list(ROWS[30:])}
    DatasetDict(parts).save_to_disk(str(folder))


def modelscope_folder(folder: Path) -> None:
    """As its hub writes it: files beside a README whose head names them by split."""
    lines(folder / "first.jsonl", ROWS[:30])
    lines(folder / "second.jsonl", ROWS[30:])
    head = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: first.jsonl\n"
    (folder / "README.md").write_text(f"---\n{head}  - split: test\n    path: second.jsonl\n---\n", encoding="utf-8")


@pytest.mark.parametrize("make", [parquet_folder, saved_folder, modelscope_folder])
@pytest.mark.parametrize("prefix", ["hf:", "modelscope:"])
def test_local_folders_in_the_hubs_layouts(
    project: Project, tmp_path: Path, make: Callable[[Path], None], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "set")
    for split, count in (("train", 30), ("test", 10)):
        job = Watched(project, hub=f"{prefix}{tmp_path / 'set'}", split=split, name="mine")
        assert importing.run(job)["num_rows"] == count  # type: ignore[arg-type]
        assert job.done[-1] == count
    assert datasets.get(project, "mine").origin["split"] == "test"
    assert [row.messages[1].content for row in datasets.load(project, "mine")] == [str(n) for n in range(30, 40)]
    with pytest.raises(DataError, match="'valid'"):
        importing.run(Watched(project, hub=f"{prefix}{tmp_path / 'set'}", split="valid", name="x"))  # type: ignore[arg-type]


def test_modelscopes_library_brings_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its download is replaced: the test has no network."""
    asked = []

    def download(dataset_id: str, *, local_dir: str) -> str:
        asked.append(dataset_id)
        modelscope_folder(Path(local_dir))
        return local_dir

    module = types.ModuleType("modelscope_hub.compat.snapshot_download")
    module.dataset_snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setattr(hub_data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "modelscope_hub", types.ModuleType("modelscope_hub"))
    monkeypatch.setitem(sys.modules, "modelscope_hub.compat", types.ModuleType("modelscope_hub.compat"))
    monkeypatch.setitem(sys.modules, "modelscope_hub.compat.snapshot_download", module)
    rows = list(hub_rows("modelscope:owner/name", "train", "", tmp_path, lambda done, total: None))
    assert asked == ["owner/name"] and [row.value for row in rows] == ROWS[:30]


@pytest.mark.parametrize("source", ["hf:../no/where", "hf:a/b/c", "modelscope:", "hf:a//b", "other:a/b"])
def test_names_that_are_no_ids(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError):
        list(hub_rows(source, "train", "", tmp_path, lambda done, total: None))


def test_a_data_set_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="offline, give a folder"):
        list(hub_rows("hf:nobody/has-this-data-set", "train", "", tmp_path, lambda done, total: None))
