"""Options that several commands share."""

from typing import Annotated

import typer

from studio.projects import Project, list_projects, open_project

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ProjectOption = Annotated[
    str, typer.Option("--project", "-p", help="Project by slug or name; the newest one when left out.")
]


def chosen(name: str) -> Project:
    """The project that `--project` names, else the newest one. Raises ProjectError when there is none."""
    if not name and (projects := list_projects()):
        return projects[0]
    return open_project(name)
