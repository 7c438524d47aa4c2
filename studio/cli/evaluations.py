"""`retune evaluations`: the scorecards that were made, to list and to keep as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.evaluate import share
from studio.cli.group import group
from studio.cli.lazy import evaluations, report, scores, store
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.errors import StudioError
from studio.paths import atomic_write_text

if TYPE_CHECKING:
    from studio.projects import Project
    from studio.store.evaluations import Answer, Evaluation

app = group("Scorecards of a project.")
NEWEST = "newest"
MARKDOWN, HTML = (".md", ".markdown"), (".html", ".htm")


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List scorecards, newest first.

    Example: retune evaluations list
    """
    found = _stored(chosen(project))
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No scorecards yet. Make one: retune evaluate RUN")
    names = [line.name for line in scores.lines(found[0].scores)]
    rows = [
        (each.id, each.subject, *(share(line.tuned) for line in scores.lines(each.scores)), each.created_at[:16])
        for each in found
    ]
    return show.table(["scorecard", "of", *names, "created"], rows)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The file to write: .html for one page, .md for Markdown.")],
    evaluation: Annotated[str, typer.Option(help="Which one, as `retune evaluations list` names it.")] = NEWEST,
    project: ProjectOption = "",
) -> None:
    """Write a scorecard with all its answers to a file.

    Example: retune evaluations export scorecard.md
    """
    if file.suffix.lower() not in (*MARKDOWN, *HTML):
        raise StudioError(f"{file.name!r} says no format.", f"Allowed endings: {', '.join((*HTML, *MARKDOWN))}.")
    chosen_one, answers = _read(chosen(project), evaluation)
    write = report.as_markdown if file.suffix.lower() in MARKDOWN else report.as_html
    atomic_write_text(file.resolve(), write(chosen_one, answers))
    show.say(f"Wrote {file.resolve()}")


def _stored(workspace: Project) -> list[Evaluation]:
    with store.open_db(workspace.folder) as db:
        return evaluations.listed(db)


def _read(workspace: Project, evaluation: str) -> tuple[Evaluation, list[Answer]]:
    """A scorecard by its id, or the newest, with its answers. Raises StudioError when it is not there."""
    found = _stored(workspace)
    if not found:
        raise StudioError(f"Project {workspace.slug} has no scorecard yet.", "Make one: retune evaluate RUN")
    with store.open_db(workspace.folder) as db:
        chosen_one = found[0] if evaluation == NEWEST else evaluations.get(db, evaluation)
        return chosen_one, evaluations.answers(db, chosen_one.id)
