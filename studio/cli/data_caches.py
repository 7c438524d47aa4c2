"""`retune data tokenize` and `retune data caches`: tokens made ahead of a run, what they take, and deleting them."""

from __future__ import annotations

from typing import Annotated

import typer

from studio.cli import follow as progress
from studio.cli import show
from studio.cli.config import find_config, with_settings
from studio.cli.lazy import caches
from studio.cli.options import JsonOption, ProjectOption, SetOption, chosen
from studio.errors import DataError
from studio.paths import human_bytes


def tokenize(
    config: Annotated[str, typer.Argument(help="A config of the project, a file, or a preset.")],
    project: ProjectOption = "",
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenise the datasets of a config ahead of its runs, which find the tokens in the project's cache.

    Example: retune data tokenize starter_lora --set data.max_length=1024
    """
    workspace = chosen(project)
    found = with_settings(find_config(config, workspace), set)
    job = caches.start(workspace, found.data, found.model.base)
    made = progress.follow(workspace.folder, job, quiet=json).result["caches"]
    if json:
        return show.as_json(made)
    columns = ("dataset", "rows", "tokens", "trained tokens", "longest", "cut", "nothing trained")
    names = ("dataset", "num_rows", "num_tokens", "num_trained_tokens", "longest", "num_truncated", "num_untrained")
    return show.table(columns, [[each[name] for name in names] for each in made])


def list_or_delete(
    delete: Annotated[str, typer.Option(metavar="KEY", help="Delete this cache.")] = "",
    delete_all: Annotated[bool, typer.Option("--delete-all", help="Delete every cache of the project.")] = False,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """List the token caches of a project, or delete them; a run builds again what it needs.

    Example: retune data caches --delete-all
    """
    workspace = chosen(project)
    if delete and delete_all:
        raise DataError("Give --delete KEY or --delete-all, not both.")
    if delete_all:
        return show.say(f"Deleted {human_bytes(caches.delete_all(workspace))}.")
    if delete:
        caches.delete(workspace, delete)
        return show.say(f"Deleted {delete}.")
    found = caches.listed(workspace)
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No token caches yet; a run makes them, or retune data tokenize.")
    rows = [(i.key, i.dataset, i.num_rows, i.num_tokens, human_bytes(i.num_bytes), i.created_at[:19]) for i in found]
    return show.table(("key", "dataset", "rows", "tokens", "size", "made at"), rows)
