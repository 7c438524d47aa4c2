"""`retune models`: base models on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from studio import model_code, models
from studio.cli import show
from studio.cli.follow import follow
from studio.cli.group import group
from studio.cli.lazy import jobs
from studio.cli.options import JsonOption, base_model
from studio.paths import human_bytes, system_folder

app = group("Base models on this machine, shared by all projects.")


@app.command()
def fetch(
    base: Annotated[
        str, typer.Argument(help="starter, a Hugging Face id such as owner/name, or modelscope:ID.")
    ] = "starter",
) -> None:
    """Download a base model; a download that was cut off goes on where it ended.

    Example: retune models fetch starter
    """
    base = base_model(base)
    fetch_if_missing(base)
    show.say(f"{base} is ready in {models.require(base)}")


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the base models that are there.

    Example: retune models list
    """
    found = models.list_models()
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No models yet. Fetch the starter: retune models fetch starter")
    return show.table(["model", "size", "folder"], [(m.name, human_bytes(m.size_bytes), m.folder) for m in found])


@app.command()
def trust(
    folder: Annotated[Path, typer.Argument(help="A model folder that brings Python code.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take consent back.")] = False,
) -> None:
    """Consent to the Python code of one model folder, as its files are now; any change asks again.

    Such code can do whatever you can do on this machine. Few models need it.

    Example: retune models trust models/chatglm3-6b
    """
    if revoke:
        model_code.distrust(folder)
        return show.say(f"The code in {folder} is not run any more.")
    files = model_code.code_files(folder)
    show.table(["file", "sha256"], list(files.items()))
    if files and not yes:
        typer.confirm("Run this code whenever the model is loaded?", abort=True)
    model_code.trust(folder, files)
    return show.say(f"Consented to {len(files)} files in {folder.resolve()}.")


def fetch_if_missing(base: str) -> None:
    """Download a base model that is not here. Raises ModelError for a folder that is incomplete."""
    model = models.resolve(base)
    if model.present:
        return
    if model.kind == "folder":
        models.require(base)  # says what it lacks: there is nothing to download
    job = jobs.start(system_folder(), "fetch", {"base": base}, title=f"fetch {base}", needs_device=False)
    follow(system_folder(), job)
