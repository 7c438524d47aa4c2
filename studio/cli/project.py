"""`retune project`: workspaces."""

from typing import Annotated

import typer

from studio import datasets, projects, runs
from studio.cli import show
from studio.cli.options import JsonOption

app = typer.Typer(help="Workspaces: one folder each, with data, configs, runs and a database.", no_args_is_help=True)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Any name, in any language; the folder gets a safe one.")],
    base: Annotated[
        str, typer.Option(help="Base model: starter, a folder, a Hugging Face id, modelscope:ID.")
    ] = "starter",
) -> None:
    """Make a project. Example: retune project new "Luna's school" """
    project = projects.create_project(name, base)
    show.say(f"Made project {project.slug} in {project.folder}")


@app.command("list")
def list_(archived: bool = typer.Option(False, help="Show archived projects too."), json: JsonOption = False) -> None:
    """List projects, newest first."""
    found = projects.list_projects(archived=archived)
    if json:
        return show.as_json(found)
    if not found:
        show.say("No projects yet. Make one: retune project new NAME")
    show.table(["project", "name", "base", "created"], [(p.slug, p.name, p.base, p.created_at[:16]) for p in found])
    return None


@app.command("show")
def show_(project: str, json: JsonOption = False) -> None:
    """Show what a project holds: datasets, configs, runs."""
    found = projects.open_project(project)
    rows, configs, done = datasets.listed(found), runs.list_configs(found), runs.list_runs(found)
    if json:
        return show.as_json({"project": found, "datasets": rows, "configs": configs, "runs": done})
    show.say(f"{found.name} ({found.slug}) on {found.base}, in {found.folder}")
    show.table(["dataset", "kind", "rows", "probes"], [(d.name, d.kind, d.num_rows, d.num_probes) for d in rows])
    show.table(["config"], [(name,) for name in configs])
    show.table(["run", "state", "step"], [(r.id, r.state, f"{r.step}/{r.num_steps}") for r in done])
    return None


@app.command()
def archive(project: str, undo: bool = typer.Option(False, help="Show it again.")) -> None:
    """Hide a project from lists; nothing is deleted."""
    changed = projects.archive_project(project, archived=not undo)
    show.say(f"{changed.slug} is {'archived' if changed.archived_at else 'shown again'}.")


@app.command()
def delete(project: str, yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask.")) -> None:
    """Delete a project with all its files."""
    found = projects.open_project(project)
    if not yes:
        typer.confirm(f"Delete {found.name!r} and everything in {found.folder}?", abort=True)
    projects.delete_project(found.slug)
    show.say(f"Deleted {found.slug}.")
