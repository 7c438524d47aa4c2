"""`retune xtuner …`: XTuner's own command lines. Each is printed as the commands of ours that it runs."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show, xtuner_lines
from studio.cli.config import find_config, with_settings
from studio.cli.group import INNER
from studio.cli.lazy import datasets, projects, runs, work_folder
from studio.cli.xtuner_lines import parse_line
from studio.errors import CheckpointError, ProjectError, StudioError
from studio.paths import sha256_of

if TYPE_CHECKING:
    from studio.config.schema import Recipe, RunConfig
    from studio.projects import Project

# XTuner's commands that have no namesake here.
ALIASES = (
    "list-dataset-format", "log-dataset", "check-custom-dataset", "test", "preprocess", "mmbench", "eval-refcoco",
)  # fmt: skip
AS_TYPED = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
PROJECT = "xtuner"  # runs that begin with XTuner's commands are all in this project


def xtuner(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="XTUNER ARGUMENTS", help="As XTuner takes them.")] = None,
) -> None:
    """Run one of XTuner's command lines as it is typed there; the retune commands that it becomes are shown.

    The table of all commands and flags: docs/xtuner.md. Runs are kept in the project xtuner, made when it is not there.

    Example: retune xtuner train config.py --work-dir train --deepspeed deepspeed_zero2
    """
    line = parse_line([*(words or ["help"])])
    try:
        HANDLERS[line.command](Shell(context), line)
    except StudioError as error:
        error.hint = xtuner_lines.in_their_words(line, error)
        raise


def alias(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="XTUNER ARGUMENTS", help="As XTuner takes them.")] = None,
) -> None:
    """The command of XTuner that has this name; see docs/xtuner.md."""
    xtuner(context, [str(context.info_name), *(words or [])])


class Shell:
    """Runs commands of ours in this process, and prints each before."""

    def __init__(self, context: typer.Context) -> None:
        self._root = context.find_root()

    def run(self, *words: str) -> None:
        """Raises StudioError when the command failed, typer.Exit where it has said why."""
        show.out.print(show.plain(f"$ retune {shlex.join(words)}"), style="bold", highlight=False)
        try:
            code = self._root.command.main(args=list(words), prog_name="retune", standalone_mode=False, obj=INNER)
        except typer.TyperException as error:  # a value out of its range, which XTuner's grammar knows nothing of
            raise StudioError(error.format_message()) from error
        if code:
            raise typer.Exit(int(code))


def _help(shell: Shell, _line: argparse.Namespace) -> None:
    shell.run("--help")


def _version(shell: Shell, _line: argparse.Namespace) -> None:
    shell.run("--version")


def _list_dataset_format(shell: Shell, _line: argparse.Namespace) -> None:
    shell.run("data", "formats")


def _list_cfg(shell: Shell, line: argparse.Namespace) -> None:
    shell.run("list-cfg", *(["-p", line.pattern] if line.pattern else []))


def _copy_cfg(shell: Shell, line: argparse.Namespace) -> None:
    shell.run("copy-cfg", line.config_name, line.save_dir)


def _chat(shell: Shell, line: argparse.Namespace) -> None:
    shell.run(*xtuner_lines.chat_words(line))


def _preprocess(shell: Shell, line: argparse.Namespace) -> None:
    categories = [word for name in line.categories for word in ("--category", name)]
    shell.run("data", "arxiv", line.src_file, line.dst_file, *categories, "--start-date", line.start_date)


def _train(shell: Shell, line: argparse.Namespace) -> None:
    """A new run, or with --resume the run of that checkpoint, which goes on; its checkpoints appear in the work dir."""
    project = _project(shell)
    if line.resume:
        return _resume(shell, line)
    source = _config_file(line.config)
    plain = find_config(source, project)
    settings = xtuner_lines.settings_of(line.cfg_options, plain.train.gradient_accumulation_steps)
    settings += xtuner_lines.process_settings(line)
    settings += [f"train.seed={line.seed}"] if line.seed is not None else []
    config = with_settings(plain, settings)
    _take_data(shell, project, config)
    try:
        shell.run("train", source, "-p", project.slug, *(word for each in settings for word in ("--set", each)))
    finally:
        _show_newest(project, config, _work_dir(line), source)
    return None


def _resume(shell: Shell, line: argparse.Namespace) -> None:
    folder = _work_dir(line)
    path = work_folder.newest(folder) if line.resume == "auto" else Path(line.resume)
    place = work_folder.place_of(path)
    if place is None:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of a run here.",
            "One of XTuner's own lacks what an exact resume needs; begin a new run with its weights "
            f"(retune train --continue-from {path}).",
        )
    project = projects.open_project(place.project)
    try:
        shell.run("train", place.run_id, "--resume", place.name, "-p", project.slug)
    finally:
        _show(project, place.run_id, runs.run_config(project, place.run_id), folder)


def _test(shell: Shell, line: argparse.Namespace) -> None:
    if line.cfg_options:
        raise CheckpointError("--cfg-options changes nothing: a run is scored as it was trained.", "Leave it out.")
    place = _place(Path(line.checkpoint) if line.checkpoint else work_folder.newest(_work_dir(line)))
    shell.run("evaluate", place.run_id, "--step", _step(place.name), "-p", place.project)


def _convert(shell: Shell, line: argparse.Namespace) -> None:
    if line.action == "merge":
        return shell.run(*xtuner_lines.merge_words(line))
    if line.action == "split":
        return shell.run("convert", "split", line.src_dir, line.dst_dir)
    if line.save_format != "xtuner":
        raise CheckpointError(f"--save-format {line.save_format} is for models that see images.", xtuner_lines.NO_LATER)
    place = work_folder.place_of(Path(line.pth_model))
    words = [place.run_id, place.name] if place else [_config_file(line.config), line.pth_model]
    words += [line.save_dir, *(["--fp32"] if line.fp32 else ["--dtype", xtuner_lines.XTUNERS_DTYPE])]
    words += ["--max-shard-size", line.max_shard_size, "--overwrite"]  # as XTuner does
    base = xtuner_lines.base_of(line.cfg_options)
    words += ["-p", place.project] if place else []
    return shell.run("convert", "pth_to_hf", *words, *(["--base", base] if base else []))


def _log_dataset(shell: Shell, line: argparse.Namespace) -> None:
    project, config = _data_of(shell, line)
    as_json = ["--json"] if line.show in ("input_ids", "labels", "all") else []
    for name in config.data.sources:
        shell.run("data", "inspect", name, "--row", "1", *_view(config), *as_json, "-p", project.slug)


def _check_custom_dataset(shell: Shell, line: argparse.Namespace) -> None:
    project, config = _data_of(shell, line)
    for name in config.data.sources:
        words = ["--base", config.model.base, "--max-length", str(config.data.max_length)]
        words += ["--template", config.data.template] if config.data.template else []
        shell.run("data", "lint", name, *words, "-p", project.slug)


def _data_of(shell: Shell, line: argparse.Namespace) -> tuple[Project, RunConfig]:
    project = _project(shell)
    config = find_config(_config_file(line.config), project)
    _take_data(shell, project, config)
    return project, config


def _view(config: RunConfig) -> list[str]:
    return ["--base", config.model.base] + (["--template", config.data.template] if config.data.template else [])


HANDLERS: dict[str, Callable[[Shell, argparse.Namespace], None]] = {
    "help": _help, "version": _version, "list-dataset-format": _list_dataset_format, "list-cfg": _list_cfg,
    "copy-cfg": _copy_cfg, "train": _train, "test": _test, "chat": _chat, "convert": _convert,
    "preprocess": _preprocess, "log-dataset": _log_dataset, "check-custom-dataset": _check_custom_dataset,
}  # fmt: skip


def _project(shell: Shell) -> Project:
    try:
        return projects.open_project(PROJECT)
    except ProjectError:
        shell.run("project", "new", PROJECT)
        return projects.open_project(PROJECT)


def _config_file(text: str) -> str:
    """The config as typed; `copy-cfg` writes YAML here, so NAME.py may also be NAME.yaml."""
    path = Path(text)
    beside = path.with_suffix(".yaml")
    return str(beside) if path.suffix == ".py" and not path.exists() and beside.is_file() else text


def _take_data(shell: Shell, project: Project, config: RunConfig) -> None:
    """Import what the config's sources are read from, where the project does not have these very files yet."""
    there = {dataset.name: dataset for dataset in datasets.listed(project)}
    for name, recipe in config.data.recipes.items():
        if name in there and _is_same(project, there[name].origin, recipe):
            continue
        words = ["data", "import", recipe.source, "--dataset", name, "--keep-good", "-p", project.slug]
        words += ["--format", recipe.format] if recipe.format else []
        words += ["--split", recipe.split] if recipe.split != "train" else []
        shell.run(*words, *(["--subset", recipe.subset] if recipe.subset else []))


def _is_same(project: Project, origin: dict[str, object], recipe: Recipe) -> bool:
    """Whether a dataset came from that file as it is now; what came from a hub stays what it is."""
    path = Path(recipe.source)
    if not path.is_file():
        return True
    kept = project.folder / str(origin.get("source") or "-")
    return kept.is_file() and sha256_of(kept) == sha256_of(path) and origin.get("format") == (recipe.format or "auto")


def _work_dir(line: argparse.Namespace) -> Path:
    return Path(line.work_dir) if line.work_dir else Path("work_dirs") / Path(line.config).stem


def _show_newest(project: Project, config: RunConfig, folder: Path, source: str) -> None:
    mine = [run.id for run in runs.list_runs(project) if run.name == config.name]
    if mine:
        _show(project, mine[0], config, folder, Path(source))


def _show(project: Project, run_id: str, config: RunConfig, folder: Path, source: Path | None = None) -> None:
    links = work_folder.show_run(project, run_id, folder, config.train.gradient_accumulation_steps, source)
    if links:
        names = ", ".join(f"{link.name} -> {os.path.basename(os.readlink(link))}" for link in links)
        show.say(f"{folder}: {names} (iter counts micro-batches, step counts updates of the weights)")


def _place(path: Path) -> work_folder.Place:
    place = work_folder.place_of(path)
    if place is None:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of a run here.",
            f"`retune checkpoints list` shows them; one of XTuner's own first: retune checkpoints import {path}",
        )
    return place


def _step(name: str) -> str:
    return Path(name).stem.removeprefix("step_")
