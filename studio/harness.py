"""Tasks of lm-evaluation-harness for a checkpoint: started as a job, read beside its scorecards."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio import jobs, runs
from studio.errors import JobError
from studio.harness_tasks import EXTRA, read_tasks
from studio.paths import typed_path
from studio.probes import paired
from studio.probes.paired import Z_95, Interval
from studio.projects import Project
from studio.store import checkpoints, open_db
from studio.store.jobs import Job

KIND = "lm_eval"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. Values are (value, low, high) by the harness's standard error, None where it gives none.

    `change` is tuned minus base where each row is right or wrong, paired row by row.
    """

    run_id: str
    step: int
    task: str
    metric: str
    num_rows: int
    base: Interval | float
    tuned: Interval | float
    change: Interval | None

    @property
    def figures(self) -> list[str]:
        """Base, tuned and change in figures, as tables show them."""
        return [_figure(self.base), _figure(self.tuned), _figure(self.change, signed=True)]


def start(project: Project, run_id: str, step: int, folder: Path, limit: int = 0) -> Job:
    """Ask the tasks of a folder in a job. Raises JobError when the extra is not installed, DataError for a bad task."""
    if find_spec("lm_eval") is None:
        raise JobError("lm-evaluation-harness is not installed.", f"Install it: {EXTRA}")
    read_tasks(folder)
    args = {"base": runs.get_run(project, run_id).base, "run_id": run_id, "step": step, "limit": limit}
    args |= {"tasks": str(typed_path(str(folder)).resolve())}
    return jobs.start(project.folder, KIND, args, title=f"lm-eval {run_id} step {step}", run_id=run_id)


def results(project: Project, run_ids: list[str]) -> list[TaskScore]:
    """What was measured of these runs; of a task and checkpoint the newest."""
    with open_db(project.folder) as db:
        outputs = [each for each in checkpoints.outputs(db, KIND) if each.run_id in run_ids]
    found: dict[tuple[str, int, str, str], TaskScore] = {}
    for output in outputs:
        for task, sides in output.detail["results"].items():
            for metric in sides["base"]["metrics"]:
                score = _score(output, task, metric, sides)
                found.setdefault((output.run_id, output.step, task, metric), score)
    return sorted(found.values(), key=lambda each: (each.task, each.metric, each.run_id, each.step))


def _score(output: checkpoints.Output, task: str, metric: str, sides: dict[str, Any]) -> TaskScore:
    base, tuned = (sides[side]["metrics"][metric] for side in ("base", "tuned"))
    return TaskScore(
        output.run_id, output.step, task, metric, sides["tuned"]["num_rows"], _interval(base), _interval(tuned),
        _change(base["marks"], tuned["marks"]),
    )  # fmt: skip


def _interval(measured: dict[str, Any]) -> Interval | float:
    value, stderr = measured["value"], measured["stderr"]
    return value if stderr is None else (value, value - Z_95 * stderr, value + Z_95 * stderr)


def _change(base: list[float], tuned: list[float]) -> Interval | None:
    if not base or len(base) != len(tuned) or not set(base + tuned) <= {0.0, 1.0}:
        return None
    return paired.share_difference([mark == 1 for mark in tuned], [mark == 1 for mark in base])


def _figure(value: Interval | float | None, signed: bool = False) -> str:
    """`0.75 (0.33 to 1.17)`: value and 95 % interval."""
    if value is None:
        return "–"
    form = "+.3g" if signed else ".3g"
    if isinstance(value, float):
        return f"{value:{form}}"
    middle, low, high = (f"{each:{form}}" for each in value)
    return f"{middle} ({low} to {high})"
