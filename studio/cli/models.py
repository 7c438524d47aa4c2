"""`retune models`: base models on this machine."""

from typing import Annotated

import typer

from studio import jobs, models
from studio.cli import show
from studio.cli.options import JsonOption
from studio.paths import human_bytes, system_folder

app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)


@app.command()
def fetch(
    base: Annotated[
        str, typer.Argument(help="starter, a Hugging Face id such as owner/name, or modelscope:ID.")
    ] = "starter",
) -> None:
    """Download a base model; a download that was cut off goes on where it ended."""
    model = models.resolve(base)
    if model.present:
        show.say(f"{base} is there: {model.folder}")
        return
    job = jobs.start(system_folder(), "fetch", {"base": base}, title=f"fetch {base}", needs_device=False)
    show.follow(system_folder(), job)
    show.say(f"{base} is ready: {models.require(base)}")


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the base models that are there."""
    found = models.list_models()
    if json:
        return show.as_json(found)
    if not found:
        show.say("No models yet. Fetch the starter: retune models fetch starter")
    show.table(["model", "size", "folder"], [(m.name, human_bytes(m.size_bytes), m.folder) for m in found])
    return None
