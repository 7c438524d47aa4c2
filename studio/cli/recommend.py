"""`retune recommend`: which checkpoint of a run to take, by its scorecards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.evaluate import share
from studio.cli.lazy import comparison
from studio.cli.options import JsonOption, ProjectOption, chosen

if TYPE_CHECKING:
    from studio.recommend import Candidate, Recommendation


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
        return show.as_json(advice)
    table(advice)
    show.say(f"\n{advice.reason}")
    for each in advice.candidates:
        if each.overfit.verdict == "overfitted":
            show.say(f"{each.run_id} step {each.step}: {' '.join(sign.sentence for sign in each.overfit.signs)}")
    if advice.left_out:
        show.say(f"Not compared, for they were asked other questions: {show.amount(advice.left_out, 'checkpoint')}.")
    if not advice.candidates:
        show.say(f"Score its checkpoints first: retune evaluate {run[0]} --step N")
    return None


def table(advice: Recommendation) -> None:
    """The checkpoints that can be compared, earliest first."""
    rows = [
        (each.run_id, each.step, share(each.identity), share(each.leakage), share(each.growth), _word(each, advice))
        for each in advice.candidates
    ]
    if rows:
        show.table(["run", "step", "identity", "leakage", "perplexity", ""], rows)


def _word(each: Candidate, advice: Recommendation) -> str:
    if each == advice.chosen:
        return "recommended"
    if each.overfit.verdict == "overfitted":
        return "overfitted"
    return "best" if each == advice.best else ""
