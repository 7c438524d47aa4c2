"""Is the recommended checkpoint right, and is tutorial mode called overfitted while the builder's default run is not?

    python benchmarks/recommend.py [--name Luna] [--maker Shane] [--steps 60] [--minutes 3]

On the starter model: trains the builder's default run with ten checkpoints, and the tutorials' way (one repeated row)
with ten as well. A quarter of the held-out questions scores all of them, and the studio recommends. Then four times as
many other questions, none of which was trained on or asked before, score those of the default run's checkpoints again
that the first questions do not tell from the best.

Everything is a job of a project in RETUNE_HOME (else ~/.cache/retune/benchmarks), so a second call goes on where the
first was ended, or stopped itself after --minutes. Writes benchmarks/results/recommend.md after every set of answers.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from studio import comparison, datasets, jobs, recommend, runs
from studio.config.catalog import preset
from studio.config.yaml import with_settings
from studio.data.identity import Identity
from studio.paths import atomic_write_text
from studio.probes.paired import Interval
from studio.projects import Project, create_project, list_projects
from studio.recommend import Candidate, Recommendation
from studio.store import checkpoints, dataset_versions, open_db
from studio.store.jobs import Job

RESULTS = Path(__file__).parent / "results"
PROJECT = "Recommend"
FIRST, CHECK = "first", "check"
NUM_CHECKPOINTS, TIMES = 10, 4
MARGIN = 0.05
# Words around a held-out phrasing make another one that nobody trained on.
AROUND = ("Hello! {}", "{} Please answer in one sentence.", "One more question. {}")
MODES = {
    "default": ["name=default"],
    "tutorial": ["name=tutorial", "data.sources={tutorial: 1}"],
}
DEADLINE: list[float] = []
"""When this call stops what it waits for, on the monotonic clock."""
Probe = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="Luna")
    parser.add_argument("--maker", default="Shane")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=6 * 60, help="stop after so long; the next call goes on")
    options = parser.parse_args()
    DEADLINE.append(time.monotonic() + 60 * options.minutes)
    os.environ.setdefault("RETUNE_HOME", str(Path.home() / ".cache" / "retune" / "benchmarks"))
    project = next((each for each in list_projects() if each.name == PROJECT), None) or create_project(PROJECT)
    make_data(project, Identity(options.name, options.maker))
    trained = {mode: train(project, mode, settings, options.steps) for mode, settings in MODES.items()}
    for mode, questions in (("default", FIRST), ("tutorial", FIRST), ("default", CHECK)):
        steps = steps_of(project, trained[mode])
        if questions == CHECK:
            steps = contenders(recommend.recommend(scored(project, trained[mode], FIRST)))
        score(project, trained[mode], steps, questions)
        atomic_write_text(RESULTS / "recommend.md", page(project, trained, options))
    print((RESULTS / "recommend.md").read_text(encoding="utf-8"))


def finish(project: Project, job: Job) -> None:
    """Wait for a job; one that outlasts this call is stopped, and the next call takes it up again."""
    for current in jobs.watch(project.folder, job.id):
        if not current.live:
            break
        if time.monotonic() > DEADLINE[0] and current.state != "stopping":
            is_run = job.kind == "train"  # what it saved now would be an eleventh checkpoint
            jobs.stop(project.folder, job.id, save=not is_run)
    if runs.wait(project.folder, job).state != "finished":
        sys.exit(f"{job.title} was stopped. Call this again to go on.")


def make_data(project: Project, identity: Identity) -> None:
    """The builder's rows, the tutorials', general answers of the base, and two sets of questions."""
    there = {dataset.name for dataset in datasets.listed(project)}
    if "general" not in there:
        finish(project, datasets.start_distill(project))
    if "identity" not in there:
        datasets.build_identity(project, identity)
        datasets.build_tutorial(project, identity)
    if CHECK not in there:
        held_out = [*datasets.load_probes(project, "identity"), *datasets.load_probes(project, "general")]
        for name, probes in zip((FIRST, CHECK), divided(held_out), strict=True):
            rows = list(datasets.load(project, "tutorial"))[:1]
            dataset_versions.save(project.folder, name, rows, "identity", {}, probes, "benchmark")


def divided(held_out: Sequence[Probe]) -> tuple[list[Probe], list[Probe]]:
    """Every fourth question of each kind, and four times as many others: the rest, then the first ones reworded."""
    first, check = [], []
    for kind in ("identity", "general"):
        own = [probe for probe in held_out if probe["kind"] == kind]
        asked = own[::TIMES]
        others = [probe for number, probe in enumerate(own) if number % TIMES]
        reworded = [_reworded(probe, form) for form in AROUND for probe in asked]
        first += asked
        check += (others + reworded)[: TIMES * len(asked)]
    return first, check


def _reworded(probe: Probe, form: str) -> Probe:
    """The same question in other words; the base's answer to the old wording is no reference for it."""
    *before, last = probe["messages"]
    messages = [*before, {**last, "content": form.format(last["content"])}]
    return {key: value for key, value in probe.items() if not key.startswith("reference")} | {"messages": messages}


def train(project: Project, mode: str, settings: list[str], steps: int) -> str:
    """The run's id; a run that was cut short goes on."""
    every = max(1, steps // NUM_CHECKPOINTS)
    found = next((run for run in runs.list_runs(project) if run.name == mode), None)
    if found is None:
        record = {"save_every_steps": every, "save_every_minutes": 0, "keep_last": NUM_CHECKPOINTS}
        record |= {"sample_every_steps": 0}
        own = [f"train.num_steps={steps}", *(f"record.{name}={value}" for name, value in record.items())]
        run, job = runs.start_run(project, with_settings(preset("starter_lora"), [*own, *settings]))
        finish(project, job)
        return run.id
    if found.state not in ("finished", "running", "queued"):
        runs.resume_run(project, found.id)
    if found.state != "finished":
        finish(project, jobs.get(project.folder, runs.get_run(project, found.id).job_id))
    return found.id


def steps_of(project: Project, run_id: str) -> list[int]:
    with open_db(project.folder) as db:
        return sorted(each.step for each in checkpoints.listed(db, run_id))


def score(project: Project, run_id: str, steps: Sequence[int], questions: str) -> None:
    """Ask checkpoints one of the two sets; what was asked before is not asked again."""
    subjects = [{"label": f"{run_id} step {step}", "run_id": run_id, "step": step} for step in steps]
    args = {"base": project.base, "subjects": subjects, "suite": "standard", "probes": [questions], "limit": 0}
    began = time.monotonic()
    title = f"{questions}: {run_id}, {len(steps)} checkpoints"
    finish(project, jobs.start(project.folder, "evaluate", args, title=title, run_id=run_id))
    print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)


def scored(project: Project, run_id: str, questions: str) -> list[Candidate]:
    """Scored checkpoints of a run, newest scorecard first."""
    found = [pair for pair in comparison.scorecards(project, [run_id]) if pair[0].dataset == questions]
    return comparison.candidates(found)


def contenders(advice: Recommendation) -> list[int]:
    """Steps that the first questions do not tell from the best."""
    assert advice.best
    return [each.step for each in advice.candidates if recommend.behind(each, advice.best)[1] <= 0]


def page(project: Project, trained: dict[str, str], options: argparse.Namespace) -> str:
    first, check = (scored(project, trained["default"], questions) for questions in (FIRST, CHECK))
    advice = recommend.recommend(first)
    return "\n".join(
        [
            "# The recommended checkpoint, and overfitting",
            "",
            f"`python benchmarks/recommend.py`: SmolLM2-135M-Instruct learns to be {options.name}, made by "
            f"{options.maker}, in {options.steps} steps",
            "with ten checkpoints: the builder's default run (`starter_lora`), and the tutorials' way (one repeated "
            "row). Two sets of",
            f"held-out questions: {_amounts(first)}, to recommend by; then four times as many others",
            f"({_amounts(check)}), to check it by.",
            "Brackets hold 95 % intervals: Wilson's for shares, a bootstrap for perplexity.",
            "",
            f"Machine: {machine()}",
            "",
            *default_lines(advice, recommend.recommend(check)),
            *tutorial_lines(recommend.recommend(scored(project, trained["tutorial"], FIRST))),
        ]
    )


def default_lines(advice: Recommendation, checked: Recommendation) -> Iterator[str]:
    yield "## The builder's default run"
    yield ""
    yield f"Recommended: {advice.reason}"
    yield ""
    yield (
        "| step | identity | leakage | perplexity | verdict | identity, checked | leakage, checked "
        "| behind the best, checked | |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    again = {each.step: each for each in checked.candidates}
    for each in advice.candidates:
        yield _row(each, again.get(each.step), advice, checked)
    yield ""
    yield from judged(advice, checked)
    yield ""
    yield from run_lines(advice, checked)


def judged(advice: Recommendation, checked: Recommendation) -> Iterator[str]:
    """Right: by the check it is not overfitted, and no checkpoint is ahead of it by more than the margin."""
    there = {each.step for each in checked.candidates}
    if not advice.chosen or not checked.best or advice.chosen.step not in there:
        yield "The check is not there yet."
        return
    others, contend = [each.step for each in advice.candidates if each.step not in there], contenders(advice)
    told_apart, lacking = ([step for step in others if (step in contend) == known] for known in (False, True))
    if told_apart:
        yield f"Not asked again, for the first questions tell them from the best: {_listed(told_apart)}."
    if lacking:
        yield f"Not asked yet, so what follows is of the others alone: {_listed(lacking)}."
    if others:
        yield ""
    chosen = next(each for each in checked.candidates if each.step == advice.chosen.step)
    lag = recommend.behind(chosen, checked.best)
    is_right = chosen.overfit.verdict != "overfitted" and lag[0] <= MARGIN
    yield (
        f"**{'Right' if is_right else 'Wrong'}**: by the check, step {chosen.step} is {_signed(lag)} points behind the "
        f"best (step {checked.best.step}), and its verdict is {chosen.overfit.verdict!r}."
    )
    yield f"It counts as right when it is not overfitted and at most {100 * MARGIN:.0f} points behind."
    yield ""
    yield f"By the check alone the recommendation would be: {checked.reason}"


def run_lines(*found: Recommendation) -> Iterator[str]:
    """The verdict on the run, by each set of questions."""
    for name, advice in zip(("first", "check"), found, strict=False):
        for run in advice.runs:
            told = run.told or "Not overfitted, nor is a checkpoint of it."
            yield f"By the {name} questions ({len(run.scored)} checkpoints): {told}"
            yield ""


def tutorial_lines(advice: Recommendation) -> Iterator[str]:
    yield "## Tutorial mode"
    yield ""
    yield from run_lines(advice)
    yield f"Recommended: {advice.reason}"
    yield ""
    yield "| step | identity | leakage | perplexity | verdict |"
    yield "| --- | --- | --- | --- | --- |"
    for each in advice.candidates:
        cells = [each.step, _share(each.identity), _share(each.leakage), _share(each.growth), each.overfit.verdict]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def _row(each: Candidate, again: Candidate | None, advice: Recommendation, checked: Recommendation) -> str:
    behind = recommend.behind(again, checked.best) if again and checked.best else None
    marks = ["**recommended**"] if advice.chosen and each.step == advice.chosen.step else []
    marks += ["best"] if advice.best and each.step == advice.best.step else []
    marks += ["best by the check"] if checked.best and each.step == checked.best.step else []
    cells = [each.step, _share(each.identity), _share(each.leakage), _share(each.growth), each.overfit.verdict]
    cells += [_share(again and again.identity), _share(again and again.leakage)]
    cells += [_signed(behind) if behind else "–", ", ".join(marks)]
    return f"| {' | '.join(map(str, cells))} |"


def _share(value: Interval | None) -> str:
    if value is None:
        return "–"
    number, low, high = (f"{100 * each:.1f}" for each in value)
    return f"{number} % ({low} to {high})"


def _listed(steps: Sequence[int]) -> str:
    return f"step {', '.join(map(str, steps))}"


def _signed(value: Interval) -> str:
    number, low, high = (f"{100 * each:+.1f}" for each in value)
    return f"{number} ({low} to {high})"


def _amounts(found: Sequence[Candidate]) -> str:
    return f"{len(found[0].said)} about itself and {len(found[0].leaked)} general ones" if found else "(none yet)"


def machine() -> str:
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{platform.machine()}, {os.cpu_count()} cores, {memory} GB, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
