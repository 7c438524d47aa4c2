"""Runs of a project beside each other: curves, what differs in their configs and data, scorecards, which to take."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from studio import harness, recommend, runs
from studio.errors import JobError
from studio.harness import TaskScore
from studio.projects import Project
from studio.recommend import Candidate, Recommendation
from studio.store import evaluations, metrics, open_db
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from studio.store.evaluations import Answer, Evaluation
from studio.store.metrics import Point
from studio.store.runs import Run

MOST_RUNS = 6
CURVES = ("train/loss", "valid/loss", "probe/identity", "probe/leakage", "train/learning_rate")
WHOLE = ("data.sources", "data.recipes")  # settings whose keys are names of datasets
Axis = Literal["step", "tokens", "seconds"]
AXES: tuple[Axis, ...] = ("step", "tokens", "seconds")


@dataclass(frozen=True)
class Change:
    """A setting, or a dataset's version, that is not the same in all runs: one text a run, "" where it has none."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All that a page or report shows. `curves` are metric -> run -> points over steps.

    `cards` has the scorecard of each run's checkpoint to take (its newest one where none is), with its answers; `tasks`
    what lm-evaluation-harness measured.
    """

    runs: tuple[Run, ...]
    settings: tuple[Change, ...]
    data: tuple[Change, ...]
    curves: Mapping[str, Mapping[str, Sequence[Point]]]
    places: Mapping[str, Mapping[Axis, Mapping[int, int]]]
    cards: Mapping[str, tuple[Evaluation, Sequence[Answer]]]
    recommendation: Recommendation
    tasks: Sequence[TaskScore] = ()

    def along(self, name: str, run_id: str, axis: Axis) -> list[Point]:
        """A curve with steps, trained tokens, or seconds since the first step (pauses left out) in place of steps."""
        points = self.curves[name][run_id]
        if axis == "step":
            return list(points)
        places = self.places[run_id][axis]
        return [replace(point, step=place) for point in points if (place := _before(places, point.step)) is not None]


def compare(project: Project, run_ids: Sequence[str]) -> Comparison:
    """One to six runs beside each other. Raises JobError for another number, or a run that is not there."""
    chosen = list(dict.fromkeys(run_ids))
    if not 1 <= len(chosen) <= MOST_RUNS:
        raise JobError(f"{len(chosen)} runs cannot be compared.", f"Choose one to {MOST_RUNS} runs.")
    found = tuple(runs.get_run(project, run_id) for run_id in chosen)
    scored = scorecards(project, chosen)
    with open_db(project.folder) as db:
        curves = {name: {each: metrics.series(db, each, name) for each in chosen} for name in CURVES}
        places = {each: _places(db, each) for each in chosen}
    return Comparison(
        runs=found,
        settings=tuple(differing([_flat(runs.run_config(project, each).model_dump()) for each in chosen])),
        data=tuple(differing([_data(run) for run in found])),
        curves={name: lines for name, lines in curves.items() if any(lines.values())},
        places=places,
        cards=_cards(scored),
        recommendation=recommend.recommend(candidates(scored)),
        tasks=harness.results(project, chosen),
    )


def advise(project: Project, run_ids: Sequence[str]) -> Recommendation:
    """Which checkpoint of these runs to take, by the scorecards that there are. Raises JobError for an unknown run."""
    for run_id in run_ids:
        runs.get_run(project, run_id)
    return recommend.recommend(candidates(scorecards(project, run_ids)))


def standing(project: Project) -> dict[tuple[str, int], str]:
    """(run, step) -> "recommended" or "overfitted", for the scored checkpoints that are one of these in their run."""
    scored = scorecards(project, run_ids_of(project))
    found: dict[tuple[str, int], str] = {}
    for run_id in dict.fromkeys(evaluation.run_id for evaluation, _ in scored):
        advice = recommend.recommend(candidates([pair for pair in scored if pair[0].run_id == run_id]))
        for each in advice.candidates:
            if each.overfit.verdict == "overfitted":
                found[run_id, each.step] = "overfitted"
        if advice.chosen:
            found[run_id, advice.chosen.step] = "recommended"
    return found


def scorecards(project: Project, run_ids: Sequence[str]) -> list[tuple[Evaluation, Sequence[Answer]]]:
    """Standard scorecards of these runs' checkpoints with their answers, newest first."""
    with open_db(project.folder) as db:
        found = [each for each in evaluations.listed(db) if each.run_id in run_ids and each.step and each.is_standard]
        return [(each, evaluations.answers(db, each.id)) for each in found]


def candidates(scored: Sequence[tuple[Evaluation, Sequence[Answer]]]) -> list[Candidate]:
    """What to choose from, in the same order."""
    return [recommend.candidate(*card) for card in scored]


def differing(sides: Sequence[Mapping[str, str]]) -> Iterator[Change]:
    """What is not the same on all sides, in the order of the first side that has it."""
    names = dict.fromkeys(name for side in sides for name in side)
    for name in names:
        values = tuple(side.get(name, "") for side in sides)
        if len(set(values)) > 1:
            yield Change(name, values)


def _cards(
    scored: Sequence[tuple[Evaluation, Sequence[Answer]]],
) -> dict[str, tuple[Evaluation, Sequence[Answer]]]:
    cards = {}
    for run_id in dict.fromkeys(evaluation.run_id for evaluation, _ in scored):
        own = [pair for pair in scored if pair[0].run_id == run_id]
        advice = recommend.recommend(candidates(own))
        wanted = advice.chosen or max(advice.candidates, key=lambda each: each.step)
        cards[run_id] = next(pair for pair in own if pair[0].id == wanted.evaluation_id)
    return cards


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """{"train.learning_rate": "0.0005"}; texts as they are, all else as JSON writes it."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and name not in WHOLE:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _data(run: Run) -> dict[str, str]:
    """Dataset -> the version that the run learnt from; runs of before versions were kept have none."""
    used = run.detail.get("datasets", {})
    return {name: f"{each['version']} ({each['fingerprint'][:12]})" for name, each in used.items()}


def _places(db: Any, run_id: str) -> dict[Axis, dict[int, int]]:
    """Step -> trained tokens up to it, and step -> seconds since the first one."""
    tokens, at = 0, {}
    for point in metrics.series(db, run_id, "train/trained_tokens"):
        tokens += int(point.value or 0)
        at[point.step] = tokens
    starts = [job.started_at for job in store_jobs.listed(db) if job.run_id == run_id and job.kind == "train"]
    return {"step": {}, "tokens": at, "seconds": _seconds(metrics.series(db, run_id, "train/loss"), starts)}


def _seconds(points: Sequence[Point], starts: Sequence[str]) -> dict[int, int]:
    """Step -> whole seconds since the first point; what lay between two processes of the run does not count."""
    passed, places = 0.0, {point.step: 0 for point in points[:1]}
    for before, after in pairwise(points):
        if not any(before.at < start <= after.at for start in starts):
            passed += (datetime.fromisoformat(after.at) - datetime.fromisoformat(before.at)).total_seconds()
        places[after.step] = round(passed)
    return places


def _before(places: Mapping[int, int], step: int) -> int | None:
    """Where a step is; one between two steps that were measured (a validation) is where the earlier one is."""
    if step in places:
        return places[step]
    earlier = [each for each in places if each <= step]
    return places[max(earlier)] if earlier else 0 if places else None


def run_ids_of(project: Project) -> list[str]:
    """Runs that have begun, newest first."""
    with open_db(project.folder) as db:
        return [run.id for run in store_runs.listed(db)]
