"""`retune suite`: what checkpoints are asked, and what their answers must hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import built_in, runs, suite_reading, suites
from studio.cli.options import JsonOption, ProjectOption, chosen

if TYPE_CHECKING:
    from studio.probes.promptfoo import Imported
    from studio.probes.suite import Suite
    from studio.projects import Project

app = group("Probe suites: what checkpoints are asked, and what their answers must hold.")
NameArgument = Annotated[str, typer.Argument(help="The suite, as `retune suite list` names it.")]
RunOption = Annotated[str, typer.Option(help="Whose held-out questions a built-in suite asks; the newest run's.")]


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List the suites that a run can be asked: built-in ones, then the project's own.

    Example: retune suite list
    """
    workspace = chosen(project)
    rows = [_summary(workspace, name) for name in suites.names(workspace)]
    if json:
        return show.as_json(rows)
    return show.table(["suite", "kind", "probes", "what"], [tuple(row.values()) for row in rows])


@app.command("show")
def show_(name: NameArgument, run: RunOption = "", project: ProjectOption = "") -> None:
    """Print a suite as YAML; a built-in one with the questions that it asks a run.

    Example: retune suite show identity > suites/mine.yaml
    """
    workspace = chosen(project)
    if name in built_in.NAMES:
        show.say(suite_reading.suite_text(_of_run(workspace, name, run)))
    else:
        show.say(suites.text_of(workspace, name))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="YAML of a suite, or of a promptfoo config.")],
    name: Annotated[str, typer.Option(help="Name of the suite; the file's when left out.")] = "",
    project: ProjectOption = "",
) -> None:
    """Bring a suite into the project, from YAML of ours or of promptfoo. What cannot be read is listed.

    Example: retune suite import promptfooconfig.yaml --name shop
    """
    found = suites.import_file(chosen(project), file, name)
    show.say(f"Imported {found.suite.name}: {_amount(found.suite)}.")
    show.say(f"Ask it: retune evaluate RUN --suite {found.suite.name}")
    _tell_left_out(file, found)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="YAML of a suite.")]) -> None:
    """Check a suite's file: every mistake with its line.

    Example: retune suite check suites/shop.yaml
    """
    show.say(f"{file.name} is a suite: {_amount(suite_reading.load_suite(file))}.")


@app.command()
def delete(name: NameArgument, project: ProjectOption = "") -> None:
    """Delete a suite of the project's own; what it measured stays.

    Example: retune suite delete shop
    """
    suites.delete(chosen(project), name)
    show.say(f"Deleted {name}.")


def _summary(workspace: Project, name: str) -> dict[str, object]:
    if name in built_in.NAMES:
        return {"suite": name, "kind": "built in", "probes": "", "what": built_in.DESCRIPTIONS[name]}
    suite = suite_reading.parse_suite(suites.text_of(workspace, name), name)
    return {"suite": name, "kind": "own", "probes": len(suite.probes()), "what": suite.description}


def _of_run(workspace: Project, name: str, run: str) -> Suite:
    return runs.suite_for(workspace, run or runs.newest_run(workspace).id, name)


def _amount(suite: Suite) -> str:
    probes, groups = len(suite.probes()), len(suite.groups)
    return f"{probes} probe{'s' * (probes != 1)} in {groups} group{'s' * (groups != 1)}"


def _tell_left_out(file: Path, found: Imported) -> None:
    if found.left_out:
        show.say(f"Left out of {file.name}:")
    for line, what in found.left_out:
        show.say(f"  - line {line}: {what}" if line else f"  - {what}")
