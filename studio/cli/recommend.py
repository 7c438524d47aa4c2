"""`retune recommend` and `compare`: which checkpoint to take, and how runs differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.evaluate import share
from studio.cli.lazy import comparison, run_report
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import StudioError
from studio.paths import atomic_write_text

if TYPE_CHECKING:
    from studio.comparison import Change, Comparison
    from studio.recommend import Candidate, Recommendation

MARKDOWN, HTML = (".md", ".markdown"), (".html", ".htm")


def recommend(
    run: Annotated[list[str], typer.Argument(help="The run, or several.")],
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Say which checkpoint to take: the earliest that held-out questions cannot tell from the best.

    Example: retune recommend starter_lora-1
    """
    advice = comparison.advise(chosen(project), run)
    if json:
        return show.as_json(_advice(advice))
    table(advice)
    _say(advice)
    if advice.left_out:
        show.say(f"Not compared, for they were asked other questions: {show.amount(advice.left_out, 'checkpoint')}.")
    if not advice.candidates:
        show.say(f"Score its checkpoints first: retune evaluate {run[0]} --step N")
    return None


def compare(
    run: Annotated[list[str], typer.Argument(help="Two to six runs.")],
    report: Annotated[
        Path | None, typer.Option(help="Write all of it, with plots and failures, to this .html or .md file.")
    ] = None,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Lay runs side by side: what differs in settings and data, scorecards, and which checkpoint to take.

    Example: retune compare starter_lora-1 tutorial-1 --report compare.html
    """
    if report and report.suffix.lower() not in (*MARKDOWN, *HTML):
        raise StudioError(f"{report.name!r} says no format.", f"Allowed endings: {', '.join((*HTML, *MARKDOWN))}.")
    workspace = chosen(project)
    found = comparison.compare(workspace, run)
    if report:
        write = run_report.as_markdown if report.suffix.lower() in MARKDOWN else run_report.as_html
        atomic_write_text(report.resolve(), write(found, workspace.name))
    if json:
        return show.as_json(_plain(found))
    names = [each.id for each in found.runs]
    show.table(["", *names], [["state", *(each.state for each in found.runs)], *run_report.score_table(found)])
    _changes("Settings that differ", found.settings, names)
    _changes("Data that differs", found.data, names)
    _say(found.recommendation)
    return show.say(f"Report: {report.resolve()}") if report else None


def _say(advice: Recommendation) -> None:
    show.say(f"\n{advice.reason} {advice.caveat}".rstrip())
    for sentence in (*run_report.overfitted(advice), *run_report.on_the_way(advice)):
        show.say(sentence)


def _changes(title: str, changes: tuple[Change, ...], names: list[str]) -> None:
    show.say(f"\n{title}:" if changes else f"\n{title}: none.")
    if changes:
        show.table(["", *names], [[change.name, *(value or "-" for value in change.values)] for change in changes])


def _plain(found: Comparison) -> dict[str, object]:
    return {
        "runs": found.runs,
        "settings": found.settings,
        "data": found.data,
        "scorecards": {run_id: card[0] for run_id, card in found.cards.items()},
        "recommendation": _advice(found.recommendation),
    }


def _advice(advice: Recommendation) -> dict[str, object]:
    """With what follows from it: a caveat, and the verdict on each run."""
    runs = {run.run_id: {"is_overfitted": run.is_overfitted, "sentence": run.told} for run in advice.runs}
    return asdict(advice) | {"caveat": advice.caveat, "runs": runs}


def table(advice: Recommendation) -> None:
    """The checkpoints that can be compared, run by run, earliest first."""
    order = list(dict.fromkeys(each.run_id for each in advice.candidates))
    rows = [
        (each.run_id, each.step, share(each.identity), share(each.leakage), share(each.growth), _word(each, advice))
        for each in sorted(advice.candidates, key=lambda each: order.index(each.run_id))
    ]
    if rows:
        show.table(["run", "step", "identity", "leakage", "perplexity", ""], rows)


def _word(each: Candidate, advice: Recommendation) -> str:
    if each == advice.chosen:
        return "recommended"
    if each.overfit.verdict == "overfitted":
        return "overfitted"
    return "best" if each == advice.best else ""
