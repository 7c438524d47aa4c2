"""`retune estimate`: what a config will need in memory, disk and time, and what would fit."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.cli import show
from studio.cli.config import find_config, with_settings
from studio.cli.follow import follow
from studio.cli.lazy import estimate as estimates
from studio.cli.lazy import forecast as forecasts
from studio.cli.lazy import machine, projects, runs, words
from studio.cli.options import JsonOption, ProjectOption, SetOption, chosen
from studio.cli.spread import DeepspeedOption, spread_out
from studio.errors import DataError, JobError
from studio.paths import human_bytes

if TYPE_CHECKING:
    from studio.config.schema import RunConfig
    from studio.estimate import Suggestion
    from studio.forecast import Forecast
    from studio.machine import Device
    from studio.projects import Project


class On(StrEnum):
    """Where the run would compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def estimate(
    config: Annotated[str, typer.Argument(help="A config of the project, a file, or a preset.")],
    memory: Annotated[str, typer.Option(help="Memory to fit into, as 8GB; this machine's when left out.")] = "",
    device: Annotated[On, typer.Option(help="cuda: a GPU, also one that is not here; auto: what is here.")] = On.AUTO,
    measure: Annotated[bool, typer.Option("--measure", help="Run a real step in a job, and remember it.")] = False,
    set: SetOption = None,
    deepspeed: DeepspeedOption = "",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Say what a config needs before it is started: memory by what holds it, disk, time, and what would fit.

    Nothing is loaded: the model's config.json is enough. Exit code 1 when it does not fit. NPROC_PER_NODE and
    --deepspeed spread it over processes as they do for train.

    Example: retune estimate starter_qlora --device cuda --memory 8GB
    """
    workspace = chosen(project) if project or projects.list_projects() else None
    loaded = spread_out(with_settings(find_config(config, workspace), set), "", deepspeed)
    on, budget = _device(device, memory)
    if measure:
        _measure(workspace, loaded)
    made = forecasts.forecast(workspace, loaded, on, budget=budget)
    ways = forecasts.suggestions(workspace, loaded, on, budget)
    num_steps = _num_steps(workspace, loaded)
    if json:
        show.as_json(_values(made, budget, ways, num_steps))
    else:
        _print(loaded, made, budget, ways, num_steps)
    if made.needed_bytes > budget:
        raise typer.Exit(1)


def _device(kind: On, memory: str) -> tuple[Device, int]:
    """The device, and the bytes to fit into."""
    here = machine.cpu() if kind == On.CPU else machine.device()
    if kind == On.CUDA and here.kind != "cuda":
        if not memory:
            raise JobError("There is no GPU here whose memory could be asked.", "Say how much it has: --memory 8GB.")
        here = machine.card(estimates.parse_bytes(memory))
    return here, estimates.parse_bytes(memory) if memory else here.memory_bytes


def _measure(project: Project | None, config: RunConfig) -> None:
    if project is None:
        raise JobError("A step is measured on a project's data, and there is no project yet.", "Make one first.")
    ended = follow(project.folder, forecasts.start_measuring(project, config))
    if ended.state != "finished":
        raise JobError(f"The step was not measured: {words.told(ended.cause)}", f"Log: {ended.log_path}")


def _num_steps(project: Project | None, config: RunConfig) -> int | None:
    """Optimizer steps of the run; None when they are counted in epochs of data that is not there."""
    try:
        return runs.planned_steps(project, config) if project else config.train.num_steps
    except DataError:
        return None


def _values(made: Forecast, budget: int, ways: list[Suggestion], num_steps: int | None) -> dict[str, Any]:
    seconds = made.pace.seconds_per_step if made.pace else None
    return {
        "device": asdict(made.device),
        "budget_bytes": budget,
        "fits": made.needed_bytes <= budget,
        "num_processes": made.num_processes,
        "memory_bytes": {**asdict(made.memory), "total": made.memory.total},
        "disk_bytes": asdict(made.disk),
        "load": asdict(made.load),
        "num_steps": num_steps,
        "pace": asdict(made.pace) if made.pace else None,
        "seconds": seconds * num_steps if seconds and num_steps else None,
        "suggestions": [{"settings": way.settings, "memory_bytes": way.memory.total, "fits": way.fits} for way in ways],
    }


def _print(config: RunConfig, made: Forecast, budget: int, ways: list[Suggestion], num_steps: int | None) -> None:
    total, word = made.needed_bytes, "fits" if made.needed_bytes <= budget else "does not fit"
    where = "a GPU" if made.device.kind == "cuda" else "this machine's processor"
    show.say(
        f"{config.name}: {config.method} on {config.model.base} needs about {human_bytes(total)} on {where}: "
        f"it {word} into {human_bytes(budget)}."
    )
    rows = [(name, human_bytes(size)) for name, size in asdict(made.memory).items() if size]
    each = "" if made.num_processes == 1 else f" of each of {made.num_processes} processes"
    show.table([f"memory at the peak{each}", ""], [*rows, ("total", human_bytes(made.memory.total))])
    show.say(f"\n{_basis(made)}")
    disk = made.disk
    merged = f"; merged model {human_bytes(disk.merged)}" if disk.merged else ""
    show.say(
        f"Disk: a checkpoint {human_bytes(disk.checkpoint)}, {human_bytes(disk.checkpoints)} at most; "
        f"converted {human_bytes(disk.converted)}{merged}."
    )
    show.say(_time(made, num_steps))
    if ways:
        show.say("\nSmaller, each line on top of the ones before:")
        show.table(["change", f"memory{each}", ""], [_way(way) for way in ways])


def _basis(made: Forecast) -> str:
    load = made.load
    basis = {
        "counted": "counted on the stored tokens",
        "drawn": "judged by some of the rows, which are not tokenised yet",
        "longest": "every example taken to be as long as may be",
    }[load.basis]
    known = "" if made.is_known_architecture else " This architecture is counted as if it were a Llama."
    twice = " With gradient checkpointing." if made.computes_twice else ""
    heap = " More than with compiled layers (a C++ compiler, train.compile: auto)." if made.is_in_heap else ""
    return f"At most {load.num_tokens} tokens are computed at once, {basis}.{known}{twice}{heap}"


def _time(made: Forecast, num_steps: int | None) -> str:
    if made.pace is None:
        return "Time: not known yet; --measure runs a real step."
    seconds = made.pace.seconds_per_step
    source = "measured" if made.pace.is_measured else f"as fast as run {made.pace.source}"
    total = f", {seconds * num_steps / 60:.1f} min for {num_steps} steps" if num_steps else ""
    return f"Time: {seconds:.2f} s a step ({source}){total}."


def _way(way: Suggestion) -> tuple[str, str, str]:
    name, value = list(way.settings.items())[-1]
    if name == "train.gradient_accumulation_steps":
        name, value = "train.micro_batch_size", way.settings["train.micro_batch_size"]
    return f"{name}={str(value).lower()}", human_bytes(way.memory.total), "fits" if way.fits else ""
