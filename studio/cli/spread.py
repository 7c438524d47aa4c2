"""How a run spreads over processes, as typed in a shell: flags, and the variables of XTuner and torchrun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.cli import show
from studio.cli.lazy import configs, launch, machine, schema
from studio.paths import atomic_write_text, typed_path

if TYPE_CHECKING:
    from studio.config.schema import DistributedSection, RunConfig
    from studio.projects import Project

LauncherOption = Annotated[
    str, typer.Option(help="What starts the processes: none, torchrun (or pytorch), deepspeed, slurm.")
]
DeepspeedOption = Annotated[
    str, typer.Option(help="Train with DeepSpeed: zero1, zero2, zero2_offload, zero3, zero3_offload, or a JSON file.")
]
SbatchOption = Annotated[
    bool, typer.Option("--print-sbatch", help="Write an sbatch file, print it and its srun line; nothing is started.")
]
XTUNER_LAUNCHERS = {"pytorch": "torchrun"}


def asked(spread: DistributedSection, launcher: str, deepspeed: str) -> dict[str, Any]:
    """What flags and environment change of the section, by name. Raises ConfigError."""
    values = {"launcher": XTUNER_LAUNCHERS.get(launcher, launcher)} if launcher else {}
    if deepspeed:
        path = typed_path(deepspeed)
        values |= {"strategy": "deepspeed", "deepspeed": str(path.resolve()) if path.is_file() else deepspeed}
    found = launch.with_environment(spread)
    values |= {"nodes": found.nodes, "processes_per_node": found.processes_per_node}
    many = found.world_size > 1 or values.get("launcher", "none") != "none"
    if many and "strategy" not in values and spread.strategy == "none":
        values["strategy"] = "ddp"
    return {name: value for name, value in values.items() if getattr(spread, name) != value}


def spread_out(config: RunConfig, launcher: str, deepspeed: str) -> RunConfig:
    """The config as flags and environment spread it. Raises ConfigError."""
    changes = asked(config.distributed, launcher, deepspeed)
    values = config.model_dump(mode="json")
    values["distributed"] |= changes
    return schema.parse_config(values, config.name) if changes else config


def write_sbatch(project: Project, config: RunConfig) -> None:
    """An sbatch file beside the project's configs that trains `config`, and what it runs on every machine.

    It asks for a GPU a process, unless GPUs are hidden here.
    """
    name = f"{config.name.removesuffix('_slurm')[:58]}_slurm"
    spread = config.distributed.model_copy(update={"launcher": "slurm"})
    configs.save_config(
        project.path("configs", f"{name}.yaml"), config.model_copy(update={"name": name, "distributed": spread})
    )
    train = ["retune", "train", name, "--project", project.slug]
    path = project.path("configs", f"{name}.sbatch")
    text = launch.sbatch_script(spread, name, train, project.folder, on_gpu=not machine.hides_gpus())
    atomic_write_text(path, text)
    show.say(text.rstrip())
    show.say(f"\nWritten: {path}. Submit it: sbatch {path}")
    show.say(f"On the machines it runs: {' '.join(launch.srun(spread, ['python', '-m', launch.MODULE, 'JOB_DIR']))}")
