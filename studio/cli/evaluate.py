"""`retune evaluate`: a checkpoint beside its base on held-out probes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.lazy import evaluations, report, runs, scores, store
from studio.cli.options import JsonOption, ProjectOption, StepOption, checkpoint_step, chosen
from studio.paths import atomic_write_text

if TYPE_CHECKING:
    from studio.projects import Project
    from studio.scores import ScoreLine
    from studio.store.evaluations import Evaluation

NAMES = {
    "identity": "knows who it is",
    "leakage": "says it unasked",
    "retention": "perplexity on what it knew, worse by",
    "changed": "general answers that changed",
}


def evaluate(
    run: Annotated[str, typer.Argument(help="The run whose checkpoint is scored.")],
    step: StepOption = 0,
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many probes of a kind; 0 asks all.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the scorecard as one HTML page to this file.")] = None,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Score a checkpoint beside its base on held-out probes: identity, leakage, retention.

    Example: retune evaluate starter_lora-1 --html scorecard.html
    """
    workspace = chosen(project)
    evaluation = score(workspace, run, checkpoint_step(workspace, run, step), limit, quiet=json)
    if html:
        write_report(workspace, evaluation, html.resolve())
    if json:
        return show.as_json(evaluation)
    scorecard(evaluation)
    return show.say(f"Report: {html.resolve()}") if html else None


def score(workspace: Project, run: str, step: int, limit: int = 0, quiet: bool = False) -> Evaluation:
    """Convert the checkpoint if need be, ask the probes, and return the stored evaluation."""
    started = runs.start_evaluate(workspace, run, step, limit)
    if not quiet:
        show.say(_asked(workspace, started.args["probes"]))
    job = follow(workspace.folder, started, quiet)
    with store.open_db(workspace.folder) as db:
        return evaluations.get(db, job.result["evaluations"][0])


def _asked(workspace: Project, probes: list[str]) -> str:
    words = ", ".join(runs.asked_identity(workspace, probes)) or "none, so that who it is and leakage are not measured"
    return f"Held-out questions of: {', '.join(probes)}. Identity asked for: {words}."


def scorecard(evaluation: Evaluation) -> None:
    """Print one evaluation: base beside tuned, with intervals."""
    show.say(f"\n{evaluation.subject} beside its base ({evaluation.base}), weights {evaluation.weights_hash[:12]}")
    rows = [
        (NAMES[line.name], share(line.base), share(line.tuned), _target(line), line.num_probes)
        for line in scores.lines(evaluation.scores)
    ]
    show.table(["", "base", "tuned", "target", "probes"], rows)
    if changed := evaluation.scores.get("setting", {}).get("changed_datasets"):
        show.say(
            f"Warning: {', '.join(changed)} changed since this run was trained; the questions may ask for another "
            "identity than it learnt."
        )


def share(triple: tuple[float, float, float] | None) -> str:
    """`93 % (85-97)`: value and 95 % interval."""
    if triple is None:
        return "-"
    value, low, high = (f"{100 * number:.3g}" for number in triple)
    return f"{value} %" if low == high else f"{value} % ({low} to {high})"


def _target(line: ScoreLine) -> str:
    if line.target is None:
        return ""
    verdict = {True: ", met", False: ", missed", None: ""}[line.met]
    return f"{'at least' if line.higher_is_better else 'at most'} {100 * line.target:.0f} %{verdict}"


def write_report(workspace: Project, evaluation: Evaluation, path: Path) -> None:
    """The evaluation as one HTML page."""
    with store.open_db(workspace.folder) as db:
        answers = evaluations.answers(db, evaluation.id)
    atomic_write_text(path, report.as_html(evaluation, answers))
