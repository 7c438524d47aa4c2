"""`retune demo`: the main job from end to end on the starter model, from a name to a measured before and after."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.config import with_settings
from studio.cli.data import summary
from studio.cli.evaluate import score, scorecard, write_report
from studio.cli.follow import follow
from studio.cli.lazy import catalog, configs, datasets, identity, projects, runs
from studio.cli.models import fetch_if_missing
from studio.cli.options import SetOption
from studio.cli.weights import say_verdict
from studio.errors import JobError
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.config.schema import RunConfig
    from studio.data.identity import Identity
    from studio.projects import Project

PRESET = "starter_lora"


def demo(
    project: Annotated[str, typer.Option("--project", "-p", help="Project to make or reuse.")] = "demo",
    name: Annotated[str, typer.Option(help="The assistant's name.")] = "Luna",
    maker: Annotated[str, typer.Option(help="Who made it.")] = "Shane",
    seed: Annotated[int, typer.Option(min=0, help="Every random choice comes from this number.")] = 0,
    tutorial: Annotated[
        bool, typer.Option("--tutorial", help="Train on one repeated row, as tutorials do, to see what goes wrong.")
    ] = False,
    set: SetOption = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Use only so many prompts and probes, for a quick look; 0 uses all.")
    ] = 0,
) -> None:
    """Build data, train the starter, convert, merge, score, and print what changed. Takes minutes on two CPU cores.

    Example: retune demo --name Luna --maker Shane
    """
    began = time.monotonic()
    config = _config(seed, tutorial, set)
    fetch_if_missing(config.model.base)
    workspace = _workspace(project, config.model.base)
    _data(workspace, config, identity.Identity(name, maker), seed, tutorial, limit)
    configs.save_config(runs.config_path(workspace, config.name), config)
    run_id, step, checkpoint = _train(workspace, config)
    _convert_and_merge(workspace, run_id, step)
    evaluation = score(workspace, run_id, step, limit)
    page = workspace.path("reports", f"{run_id}-step_{step}.html")
    write_report(workspace, evaluation, page)
    scorecard(evaluation)
    _where_to_look(workspace, run_id, step, checkpoint)
    show.say(f"Report: {page}")
    show.say(f"Took {(time.monotonic() - began) / 60:.1f} minutes. Look around: retune studio")


def _config(seed: int, tutorial: bool, settings: list[str] | None) -> RunConfig:
    chosen = [f"train.seed={seed}"]
    if tutorial:
        chosen += ["data.sources={tutorial: 1}", "name=tutorial"]
    return with_settings(catalog.preset(PRESET), [*chosen, *(settings or [])])


def _workspace(name: str, base: str) -> Project:
    """The project of that slug or name. Two of one name are an error, and no reason to make a third."""
    known = any(name in (one.slug, one.name) for one in projects.list_projects(archived=True))
    return projects.open_project(name) if known else projects.create_project(name, base)


def _data(project: Project, config: RunConfig, who: Identity, seed: int, tutorial: bool, limit: int) -> None:
    """The datasets that the preset (or the tutorials) use; general answers are kept, they do not depend on the name."""
    if not _has_general(project, config.model.base, limit):
        follow(project.folder, datasets.start_distill(project, limit=limit, base=config.model.base))
    if tutorial:
        built = datasets.build_tutorial(project, who)
    else:
        built = datasets.build_identity(project, who, seed=seed)
    for dataset in (datasets.get(project, "general"), built):
        show.say(summary(dataset))


def _has_general(project: Project, base: str, limit: int) -> bool:
    """Whether the general set that is there are this base's answers, as many as asked for, or a person's own rows."""
    found = next((dataset for dataset in datasets.listed(project) if dataset.name == "general"), None)
    if found is None or found.kind != "general":
        return found is not None
    if (found.origin.get("base"), found.origin.get("limit")) == (base, limit):
        return True
    show.say("The dataset general holds another base's answers, or another number of them: it is made again.")
    return False


def _train(project: Project, config: RunConfig) -> tuple[str, int, str]:
    """(run, its last step, its checkpoint). Raises JobError when it was stopped: a part of a run proves nothing."""
    run, job = runs.start_run(project, config)
    ended = follow(project.folder, job)
    if ended.state == "stopped":
        raise JobError("The training was stopped, and the demo with it.", f"Go on with it: retune runs resume {run.id}")
    return run.id, runs.get_run(project, run.id).step, str(ended.result["checkpoint"])


def _convert_and_merge(project: Project, run_id: str, step: int) -> None:
    follow(project.folder, runs.start_convert(project, run_id, step))
    say_verdict(follow(project.folder, runs.start_merge(project, run_id, step)))


def _where_to_look(project: Project, run_id: str, step: int, checkpoint: str) -> None:
    adapter = runs.hf_folder(project, run_id, step)
    size = human_bytes(sum(file.stat().st_size for file in adapter.glob("*.safetensors")))
    show.say(f"\nProject {project.slug} in {project.folder}")
    show.say(f"Checkpoint: {project.folder / checkpoint}")
    show.say(f"Adapter ({size}): {adapter}")
    show.say(f"Merged model: {project.path('merged', f'{run_id}-step_{step}')}")
    show.say(f'Ask it yourself: retune chat --project {project.slug} --adapter {run_id}:{step} --prompt "Who are you?"')
