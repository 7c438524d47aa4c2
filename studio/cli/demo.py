"""`retune demo`: the main job from end to end on the starter model, from a name to a measured before and after."""

import time
from typing import Annotated

import typer

from studio import datasets, jobs, models, projects, report, runs
from studio.cli import show
from studio.cli.weights import scorecard
from studio.config.catalog import preset
from studio.config.schema import RunConfig
from studio.config.yaml import save_config, with_settings
from studio.data.identity import Identity
from studio.errors import ProjectError
from studio.paths import atomic_write_text, human_bytes, system_folder
from studio.projects import Project
from studio.store import evaluations, open_db

PRESET = "starter_lora"


def demo(
    project: Annotated[str, typer.Option(help="Project to make or reuse.")] = "demo",
    name: Annotated[str, typer.Option(help="The assistant's name.")] = "Luna",
    maker: Annotated[str, typer.Option(help="Who made it.")] = "Shane",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tutorial: Annotated[
        bool, typer.Option(help="Train on one repeated row, as tutorials do, to see what goes wrong.")
    ] = False,
) -> None:
    """Build data, train the starter, convert, merge, score, and print what changed. Takes minutes on two CPU cores."""
    began = time.monotonic()
    _fetch_starter()
    workspace = _workspace(project)
    config = _data_and_config(workspace, Identity(name, maker), seed, tutorial)
    run, job = runs.start_run(workspace, config)
    ended = show.follow(workspace.folder, job)
    step = runs.get_run(workspace, run.id).step
    show.follow(workspace.folder, runs.start_convert(workspace, run.id, step))
    merged = show.follow(workspace.folder, runs.start_merge(workspace, run.id, step))
    scored = show.follow(workspace.folder, runs.start_evaluate(workspace, run.id, step))
    with open_db(workspace.folder) as db:
        evaluation = evaluations.get(db, scored.result["evaluations"][0])
        answers = evaluations.answers(db, evaluation.id)
    page = workspace.path("reports", f"{run.id}-step_{step}.html")
    atomic_write_text(page, report.as_html(evaluation, answers))
    scorecard(evaluation)
    _where_to_look(workspace, run.id, step, ended.result, merged.result)
    show.say(f"Report: {page}")
    show.say(f"Took {(time.monotonic() - began) / 60:.1f} minutes. Look around: make studio")


def _fetch_starter() -> None:
    if not models.resolve("starter").present:
        job = jobs.start(system_folder(), "fetch", {"base": "starter"}, title="fetch starter", needs_device=False)
        show.follow(system_folder(), job)


def _workspace(name: str) -> Project:
    try:
        return projects.open_project(name)
    except ProjectError:
        return projects.create_project(name)


def _data_and_config(project: Project, identity: Identity, seed: int, tutorial: bool) -> RunConfig:
    """The datasets that the preset (or the tutorials) use, and the config that trains on them, saved."""
    if not any(dataset.name == "general" for dataset in datasets.listed(project)):
        show.follow(project.folder, datasets.start_distill(project))
    settings = [f"train.seed={seed}"]
    if tutorial:
        built = datasets.build_tutorial(project, identity)
        settings += ["data.sources={tutorial: 1}", "name=tutorial"]
    else:
        built = datasets.build_identity(project, identity, seed=seed)
    show.say(f"{built.name}: {built.num_rows} rows, {built.num_probes} held-out probes")
    config = with_settings(preset(PRESET), settings)
    save_config(runs.config_path(project, config.name), config)
    return config


def _where_to_look(
    project: Project, run_id: str, step: int, trained: dict[str, object], merged: dict[str, object]
) -> None:
    size = human_bytes(sum(file.stat().st_size for file in runs.hf_folder(project, run_id, step).glob("*.safetensors")))
    show.say(f"\nProject {project.slug} in {project.folder}")
    show.say(f"Checkpoint: {project.folder / str(trained['checkpoint'])}")
    show.say(f"Adapter ({size}): {runs.hf_folder(project, run_id, step)}")
    show.say(f"Merged model: {merged['path']}")
    show.say(f'Ask it yourself: retune chat --project {project.slug} --adapter {run_id}:{step} --prompt "Who are you?"')
