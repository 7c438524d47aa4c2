"""Tasks of lm-evaluation-harness, read from a folder of YAML files without running any code of it.

The harness's own reader runs what `!function`, `class:` and metric scripts name, and fetches data sets from a hub. Here
a task is plain values and its rows lie in local files (format: docs/new_task_guide.md of that project).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from studio.errors import DataError
from studio.paths import inside, typed_path

EXTRA = 'pip install "retune[lm-eval]"'
ROW_FORMATS = ("json", "csv", "parquet", "text", "arrow")
MAX_FILES, MAX_BYTES, MAX_INCLUDES = 2000, 1 << 20, 8
RUNS_CODE = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code")

Task = dict[str, Any]


def read_tasks(folder: Path) -> list[Task]:
    """The tasks of a folder, by name; paths of their rows are absolute, inside the folder.

    Raises DataError for a task that needs code or the network, and when there is none.
    """
    folder = typed_path(str(folder)).resolve()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml") and path.is_file())
    if len(files) > MAX_FILES:
        raise DataError(f"{folder.name} has {len(files)} YAML files.", f"At most {MAX_FILES}: name a smaller folder.")
    found = [_task(folder, path) for path in files]
    tasks = [task for task in found if isinstance(task.get("task"), str)]
    if not tasks:
        raise DataError(
            f"There is no task in {str(folder)!r}.", "A task is a YAML file with `task: NAME` and `dataset_path: json`."
        )
    _require_different_names(tasks)
    return [_with_local_rows(folder, task) for task in tasks]


def _task(folder: Path, path: Path, depth: int = 0) -> Task:
    """A file's values over those of what it includes."""
    values = _values(path)
    wanted = values.pop("include", [])
    if depth == MAX_INCLUDES:
        raise DataError(f"{path.name} includes files in a circle.", "Take one `include` out.")
    merged: Task = {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        included = inside(folder, path.parent / str(name))
        if not included.is_file():
            raise DataError(f"{path.name} includes {name!r}, which is not there.", "Correct its `include`.")
        merged |= _task(folder, included, depth + 1)
    return merged | values | {"_file": path}


def _values(path: Path) -> Task:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes.", "That is no task; leave it out.")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError) as error:
        if "!function" in text:
            raise _needs_code(path, "!function") from error
        raise DataError(f"{path.name} is not plain YAML: {' '.join(str(error).split())[:200]}", "Mend it.") from error
    return values if isinstance(values, dict) else {}


def _with_local_rows(folder: Path, task: Task) -> Task:
    path: Path = task.pop("_file")
    for key in RUNS_CODE:
        if task.get(key):
            raise _needs_code(path, key)
    _require_known_metrics(path, task)
    if task.get("dataset_path") not in ROW_FORMATS:
        raise DataError(
            f"The rows of {task['task']!r} are {task.get('dataset_path')!r} of a hub.",
            f"Put them in a file beside it, with `dataset_path` one of {', '.join(ROW_FORMATS)} and `data_files`.",
        )
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if not files:
        raise DataError(
            f"The task {task['task']!r} names no rows.", "Give `dataset_kwargs: {data_files: {test: FILE}}`."
        )
    return task | {"dataset_kwargs": {"data_files": _local(folder, path, files)}}


def _local(folder: Path, path: Path, files: Any) -> Any:
    """The same names as absolute paths. Raises DataError for one that is not there, ProjectError for one outside."""
    if isinstance(files, Mapping):
        return {str(split): _local(folder, path, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_local(folder, path, name) for name in files]
    found = inside(folder, path.parent / str(files))
    if not found.is_file():
        raise DataError(f"The rows {str(files)!r} of {path.name} are not there.", "Put that file beside the task.")
    return str(found)


def _require_known_metrics(path: Path, task: Task) -> None:
    """A metric that the harness does not know itself is a script that it would fetch, or run from a path."""
    for metric in task.get("metric_list") or []:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if not isinstance(name, str) or "/" in name or "\\" in name or "." in name:
            raise _needs_code(path, f"the metric {name!r}")
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise _needs_code(path, "hf_evaluate")


def _require_different_names(tasks: list[Task]) -> None:
    names = [task["task"] for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"Several files define the task {twice[0]!r}.", "Give each task a name of its own.")


def _needs_code(path: Path, what: str) -> DataError:
    return DataError(
        f"{path.name} uses {what}, which would run Python code of its folder.",
        "Only tasks of plain values are run: write them with templates ({{question}}) and the harness's own metrics.",
    )
