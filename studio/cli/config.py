"""`retune config`: presets and the project's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.group import group
from studio.cli.lazy import catalog, configs, datasets, exporting, formats, importing, projects, runs
from studio.cli.options import JsonOption, ProjectOption, SetOption, base_model, chosen
from studio.errors import ConfigError, Problem
from studio.paths import atomic_write_text

if TYPE_CHECKING:
    from studio.config.schema import RunConfig
    from studio.config.xtuner.importing import Imported
    from studio.projects import Project

app = group("Configs: everything one run needs.")
ConfigArgument = Annotated[str, typer.Argument(help="A config of the project, a file, or a built-in one.")]


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List the presets and the project's configs.

    Example: retune config list --project demo
    """
    workspace = _project_if_any(project)
    rows = [(name, "preset", "") for name in catalog.preset_names()]
    if workspace:
        rows += [(n, workspace.slug, str(runs.config_path(workspace, n))) for n in runs.list_configs(workspace)]
    if json:
        return show.as_json([{"config": name, "where": where, "file": file} for name, where, file in rows])
    return show.table(["config", "where", "file"], rows)


@app.command()
def new(
    preset: Annotated[
        str, typer.Argument(help="A built-in config: starter_lora, or a name of `retune list-cfg`.")
    ] = "starter_lora",
    name: Annotated[str, typer.Option(help="Name of the new config; the preset's when left out.")] = "",
    set: SetOption = None,
    project: ProjectOption = "",
) -> None:
    """Copy a built-in config into a project, with its comments, to be edited.

    Example: retune config new starter_lora --name luna --set train.learning_rate=3e-4
    """
    workspace = chosen(project)
    text = runs.preset_text(workspace, preset)
    named = [f"name={name}"] if name else []
    config = with_settings(configs.load_text(text, preset), [*(set or []), *named])
    path = runs.config_path(workspace, config.name)
    if path.exists():
        there = Problem("name", f"config {config.name!r} is there already", "another --name, or edit the file")
        raise ConfigError([there], "config new")
    atomic_write_text(path, configs.update_text(text, config))
    show.say(f"Wrote {path}")


@app.command()
def check(config: ConfigArgument, set: SetOption = None, project: ProjectOption = "") -> None:
    """Check a config: every problem at once, each with its path and what is allowed.

    Example: retune config check luna
    """
    workspace = _project_if_any(project)
    loaded = with_settings(find_config(config, workspace), set)
    show.say(f"{loaded.name} is sound: {loaded.method} on {loaded.model.base}, {loaded.examples_per_step} rows a step.")
    for problem in runs.problems_before_start(workspace, loaded) if workspace else []:
        show.say(f"It cannot start in project {workspace.slug} yet: {problem}")


@app.command("show")
def show_(config: ConfigArgument, set: SetOption = None, project: ProjectOption = "") -> None:
    """Print a config in full as YAML, defaults included.

    Example: retune config show starter_lora
    """
    loaded = with_settings(find_config(config, _project_if_any(project)), set)
    print(configs.update_text("", loaded), end="")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An XTuner config (.py), written or dumped.")],
    out: Annotated[Path | None, typer.Option(help="The YAML file; the project's configs when left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    project: ProjectOption = "",
) -> None:
    """Read an XTuner config without running it, and write it as YAML. What was not taken over is listed with its line.

    Example: retune config import internlm2_1_8b_qlora_alpaca_e3_copy.py --out luna.yaml
    """
    found = importing.import_file(file)
    path = out or runs.config_path(chosen(project), found.config.name)
    if path.exists() and not force:
        raise ConfigError([Problem("file", f"{path} is there already", "--force replaces it")], "config import")
    atomic_write_text(path, found.text)
    show.say(f"Wrote {path}")
    say_imported(found)


@app.command()
def export(
    config: ConfigArgument,
    xtuner: Annotated[Path, typer.Option("--xtuner", metavar="OUT.py", help="The Python file for XTuner 0.1.23.")],
    set: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    project: ProjectOption = "",
) -> None:
    """Write a config as one of XTuner's, which XTuner takes and `retune config import` reads back as it was.

    Rows that XTuner cannot read where they are, those of the project's own datasets, are written beside it.

    Example: retune config export luna --xtuner luna.py
    """
    if xtuner.exists() and not force:
        raise ConfigError([Problem("file", f"{xtuner} is there already", "--force replaces it")], "config export")
    workspace = _project_if_any(project)
    loaded = with_settings(find_config(config, workspace), set)
    found = exporting.export_file(loaded, xtuner)
    there = {dataset.name for dataset in datasets.listed(workspace)} if workspace else frozenset()
    for name, file in found.written.items():
        if workspace and name in there:
            count = formats.write_turns(xtuner.parent / file, datasets.stream(workspace, name))
            show.say(f"Wrote {xtuner.parent / file}: {count} rows")
        else:
            show.warn(f"XTuner will look for the rows of {name} in {xtuner.parent / file}; they are not in a project.")
    atomic_write_text(xtuner, found.text)
    show.say(f"Wrote {xtuner}" + (f"; run XTuner in {xtuner.resolve().parent}" if found.written else ""))
    for note in found.notes:
        show.say(f"Otherwise there: {note}.")


def say_imported(found: Imported) -> None:
    """What is otherwise than in the Python config, and what was not taken over."""
    for note in found.notes:
        show.say(f"Otherwise: {note}.")
    for each in found.unread:
        show.warn(f"Not taken over: {each}")


def find_config(config: str, project: Project | None) -> RunConfig:
    """A config by file, by name in the project, or by built-in name. Raises ConfigError that lists what there is.

    An XTuner config (.py) is imported on the way; one that cannot be taken over whole is refused.
    """
    path = Path(config)
    if path.suffix == ".py":
        return _imported_whole(path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return configs.load_config(path)
    own = runs.list_configs(project) if project else []
    if project and config in own:
        return configs.load_config(runs.config_path(project, config))
    if catalog.is_built_in(config):
        text = runs.preset_text(project, config) if project else catalog.preset_text(config)
        return configs.load_text(text, config)
    near = catalog.listed(config)[:5] if config else []
    there = ", ".join([*near, *catalog.preset_names(), *own]) + "; `retune list-cfg` lists all built-in ones"
    raise ConfigError([Problem("config", f"there is no config or file {config!r}", there)], "The command")


def _imported_whole(path: Path) -> RunConfig:
    found = importing.import_file(path)
    if found.unread:
        hint = "`retune config import` writes it as YAML with these listed; look at it, then train that"
        raise ConfigError([Problem("(file)", f"not taken over: {each}", hint) for each in found.unread], path.name)
    say_imported(found)
    return found.config


def with_settings(config: RunConfig, settings: list[str] | None) -> RunConfig:
    """`config` with `--set` applied; a base model's folder counts from where the person stands."""
    if not settings:
        return config
    prefix = "model.base="
    typed = [prefix + base_model(s.removeprefix(prefix)) if s.startswith(prefix) else s for s in settings]
    return configs.with_settings(config, typed)


def _project_if_any(name: str) -> Project | None:
    return chosen(name) if name or projects.list_projects() else None
