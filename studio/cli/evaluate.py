"""`retune evaluate`: checkpoints beside their base, asked a suite of probes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.lazy import built_in, evaluations, report, runs, scores, store
from studio.cli.options import JsonOption, ProjectOption, StepOption, checkpoint_step, chosen
from studio.errors import StudioError
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
    run: Annotated[str, typer.Argument(help="The run whose checkpoints are scored.")],
    step: StepOption = 0,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Score every checkpoint that the run kept, in one job.")
    ] = False,
    suite: Annotated[str, typer.Option(help="What is asked: a suite that `retune suite list` names.")] = "standard",
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many probes of each group; 0 asks all.")] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write the scorecard, of several the last, as an HTML page.")
    ] = None,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Score checkpoints beside their base on held-out probes. What was scored before is not asked again.

    Example: retune evaluate starter_lora-1 --all-checkpoints --suite identity
    """
    if step and all_checkpoints:
        raise StudioError("--step and --all-checkpoints exclude each other.", "Leave one of them out.")
    workspace = chosen(project)
    steps = () if all_checkpoints else (checkpoint_step(workspace, run, step),)
    runs.get_run(workspace, run)
    made = score_all(workspace, run, steps, limit, suite, quiet=json)
    if html:
        write_report(workspace, made[-1], html.resolve())
    if json:
        return show.as_json(made if all_checkpoints else made[0])
    if all_checkpoints:
        _by_checkpoint(made)
    else:
        scorecard(made[0])
    return show.say(f"Report of step {made[-1].step}: {html.resolve()}") if html else None


def score(workspace: Project, run: str, step: int, limit: int = 0, quiet: bool = False) -> Evaluation:
    """Ask a checkpoint the standard probes, and return the stored evaluation."""
    return score_all(workspace, run, (step,), limit, "standard", quiet)[0]


def score_all(
    workspace: Project, run: str, steps: tuple[int, ...], limit: int, suite: str, quiet: bool
) -> list[Evaluation]:
    """Ask these checkpoints, all for none, and return their stored evaluations by step."""
    started = runs.start_evaluate_all(workspace, run, steps, limit, suite)
    if not quiet:
        show.say(_asked(workspace, suite, started.args["probes"]))
    job = follow(workspace.folder, started, quiet)
    if not quiet and (known := job.result["num_from_cache"]):
        show.say(f"From cache: {known} of {len(job.result['evaluations'])} scored before, with the same weights.")
    with store.open_db(workspace.folder) as db:
        return [evaluations.get(db, each) for each in job.result["evaluations"]]


def _asked(workspace: Project, suite: str, probes: list[str]) -> str:
    if suite not in built_in.NAMES:
        return f"Questions of the suite {suite}."
    words = ", ".join(runs.asked_identity(workspace, probes)) or "none, so that who it is and leakage are not measured"
    told = f"Held-out questions of: {', '.join(probes)}. Identity asked for: {words}."
    return told if suite == "standard" else f"Suite {suite}. {told}"


def scorecard(evaluation: Evaluation) -> None:
    """Print one evaluation: base beside tuned, with intervals, and what can be said of the difference."""
    show.say(f"\n{evaluation.subject} beside its base ({evaluation.base}), weights {evaluation.weights_hash[:12]}")
    rows = [
        (NAMES[line.name], share(line.base), share(line.tuned), _target(line), line.num_probes)
        for line in scores.lines(evaluation.scores)
        if line.num_probes
    ]
    if rows:
        show.table(["", "base", "tuned", "target", "probes"], rows)
    _divergence(evaluation)
    if groups := evaluation.scores.get("groups"):
        show.table(["probes passed", "base", "tuned", "difference"], [_group_row(*pair) for pair in groups.items()])
    if changed := evaluation.scores.get("setting", {}).get("changed_datasets"):
        show.say(
            f"Warning: {', '.join(changed)} changed since this run was trained; the questions may ask for another "
            "identity than it learnt."
        )


def _group_row(name: str, sides: dict[str, Any]) -> tuple[str, str, str, str]:
    base, tuned = (share(scores.triple(sides[side])) for side in ("base", "tuned"))
    return name, base, tuned, scores.in_words(sides["difference"])


def _divergence(evaluation: Evaluation) -> None:
    found = evaluation.scores.get("divergence") or {}
    if found.get("value") is not None:
        show.say(
            f"Predictions apart from the base's: {found['value']:.3g} nats a token "
            f"({found['low']:.3g} to {found['high']:.3g}) on its own answers."
        )


def _by_checkpoint(made: list[Evaluation]) -> None:
    """One line a checkpoint."""
    names = [line.name for line in scores.lines(made[0].scores) if line.num_probes]
    rows = [
        (
            each.step,
            *(share(line.tuned) for line in scores.lines(each.scores) if line.name in names),
            share(scores.triple(each.scores["all"]["tuned"])),
            scores.in_words(each.scores["all"]["difference"]),
        )
        for each in made
    ]
    show.table(["step", *(NAMES[name] for name in names), "probes passed", "against the base"], rows)


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
