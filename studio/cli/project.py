"""`retune project`: workspaces."""

from typing import Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import datasets, projects, runs
from studio.cli.options import JsonOption, base_model

app = group("Projects: one folder each, with data, configs, runs and a database.")
ProjectArgument = Annotated[str, typer.Argument(help="Project by slug or name.")]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Any name, in any language; the folder gets a safe one.")],
    base: Annotated[
        str, typer.Option(help="Base model: starter, a folder, a Hugging Face id, modelscope:ID.")
    ] = "starter",
) -> None:
    """Make a project.

    Example: retune project new "Luna's school"
    """
    project = projects.create_project(name, base_model(base))
    show.say(f"Made project {project.slug} in {project.folder}")


@app.command("list")
def list_(
    archived: Annotated[bool, typer.Option("--archived", help="Show archived projects too.")] = False,
    json: JsonOption = False,
) -> None:
    """List projects, newest first.

    Example: retune project list --archived
    """
    found = projects.list_projects(archived=archived)
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No projects yet. Make one: retune project new NAME")
    rows = [(p.slug, p.name, p.base, p.created_at[:16], "archived" if p.archived_at else "") for p in found]
    return show.table(["project", "name", "base", "created", ""], rows)


@app.command("show")
def show_(project: ProjectArgument, json: JsonOption = False) -> None:
    """Show what a project holds: datasets, configs, runs.

    Example: retune project show demo
    """
    found = projects.open_project(project)
    rows, configs, done = datasets.listed(found), runs.list_configs(found), runs.list_runs(found)
    if json:
        return show.as_json({"project": found, "datasets": rows, "configs": configs, "runs": done})
    show.say(f"{found.name} ({found.slug}) on {found.base}, in {found.folder}")
    if rows:
        show.say("")
        show.table(["dataset", "kind", "rows", "probes"], [(d.name, d.kind, d.num_rows, d.num_probes) for d in rows])
    if configs:
        show.say(f"\nConfigs: {', '.join(configs)}")
    if done:
        show.say("")
        show.table(["run", "state", "step"], [(r.id, r.state, f"{r.step}/{r.num_steps}") for r in done])
    if not rows:
        show.say(f"\nNext: retune data identity --name Luna --maker Shane --project {found.slug}")
    return None


@app.command()
def archive(
    project: ProjectArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Show it again.")] = False,
) -> None:
    """Hide a project from lists; nothing is deleted.

    Example: retune project archive demo
    """
    changed = projects.archive_project(projects.open_project(project).slug, archived=not undo)
    show.say(f"{changed.slug} is {'archived' if changed.archived_at else 'shown again'}.")


@app.command()
def delete(
    project: ProjectArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Delete a project with all its files.

    Example: retune project delete demo --yes
    """
    found = projects.open_project(project)
    if not yes:
        typer.confirm(f"Delete {found.name!r} and everything in {found.folder}?", abort=True)
    projects.delete_project(found.slug)
    show.say(f"Deleted {found.slug}.")
