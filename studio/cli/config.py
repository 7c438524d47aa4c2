"""`retune config`: presets and the project's own configs."""

from pathlib import Path
from typing import Annotated

import typer

from studio import runs
from studio.cli import show
from studio.cli.options import ProjectOption, chosen
from studio.config.catalog import preset_names, preset_text
from studio.config.schema import RunConfig
from studio.config.yaml import load_config, load_text, update_text, with_settings
from studio.errors import ConfigError, Problem
from studio.paths import atomic_write_text
from studio.projects import Project

app = typer.Typer(help="Configs: everything one run needs.", no_args_is_help=True)


@app.command("list")
def list_(project: ProjectOption = "") -> None:
    """List the presets and the project's configs."""
    own = runs.list_configs(chosen(project)) if project else []
    show.table(["config", "where"], [(n, "preset") for n in preset_names()] + [(n, project) for n in own])


@app.command()
def new(
    preset: Annotated[
        str, typer.Argument(help="A preset: starter_lora, starter_qlora, starter_full.")
    ] = "starter_lora",
    name: Annotated[str, typer.Option(help="Name of the new config; the preset's when left out.")] = "",
    set: Annotated[
        list[str] | None, typer.Option(help="A setting, as train.learning_rate=1e-4; again for more.")
    ] = None,
    project: ProjectOption = "",
) -> None:
    """Copy a preset into a project, with its comments, to be edited."""
    workspace = chosen(project)
    config = with_settings(load_text(preset_text(preset), preset), [*(set or []), f"name={name or preset}"])
    path = runs.config_path(workspace, config.name)
    if path.exists():
        raise ConfigError([Problem("name", f"config {config.name!r} is there already")], "config new")
    atomic_write_text(path, update_text(preset_text(preset), config))
    show.say(f"Wrote {path}")


@app.command()
def check(config: str, project: ProjectOption = "") -> None:
    """Check a config: every problem at once, each with its path and what is allowed."""
    loaded = find_config(config, project)
    show.say(f"{loaded.name} is sound: {loaded.method} on {loaded.model.base}, {loaded.examples_per_step} rows a step.")


@app.command("show")
def show_(config: str, project: ProjectOption = "") -> None:
    """Print a config in full, defaults included."""
    print(update_text("", find_config(config, project)), end="")


def find_config(config: str, project: str = "") -> RunConfig:
    """A config by file, by name in the project, or by preset name. Raises ConfigError that lists what there is."""
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load_config(path)
    workspace: Project | None = chosen(project) if project or config not in preset_names() else None
    if workspace and config in runs.list_configs(workspace):
        return load_config(runs.config_path(workspace, config))
    if config in preset_names():
        return load_text(preset_text(config), config)
    there = preset_names() + (runs.list_configs(workspace) if workspace else [])
    raise ConfigError([Problem("config", f"there is no config or file {config!r}", ", ".join(there))], "config")
