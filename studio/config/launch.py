"""What starts the processes of a run: argument lists for torchrun, DeepSpeed and SLURM, and the variables they read.

Every process runs `python -m studio.engine.ranks JOB_DIR`; who starts it tells it its rank by environment variables.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.config.schema import DistributedSection, RunConfig, parse_config
from studio.errors import ConfigError, Problem

MODULE = "studio.engine.ranks"
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 29500
HOSTS = "hosts"
# Ours first, then what XTuner and torchrun call the same thing.
NODES = ("NNODES",)
NODE_RANK = ("NODE_RANK", "GROUP_RANK")
PROCESSES = ("NPROC_PER_NODE", "LOCAL_WORLD_SIZE")
ADDRESS = ("ADDR", "MASTER_ADDR")
PORT = ("PORT", "MASTER_PORT")


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet: which machine this is, and the first one's address. Port 0: any free one."""

    node_rank: int = 0
    address: str = DEFAULT_ADDRESS
    port: int = 0


def with_environment(spread: DistributedSection, environment: Mapping[str, str] = os.environ) -> DistributedSection:
    """The section with nodes and processes as the environment says, where it does. Raises ConfigError."""
    found = {
        name: number
        for name, keys in (("nodes", NODES), ("processes_per_node", PROCESSES))
        if (number := _number(environment, keys, 1)) is not None
    }
    return DistributedSection.model_validate({**spread.model_dump(), **found}) if found else spread


def spread_anew(config: RunConfig, distributed: Mapping[str, Any]) -> RunConfig:
    """The config with other distribution settings and the same rows in every step. Raises ConfigError."""
    if not distributed:
        return config
    spread = DistributedSection.model_validate({**config.distributed.model_dump(), **distributed})
    rows, per_pass = config.examples_per_step, config.train.micro_batch_size * spread.world_size
    if rows % per_pass:
        problem = f"{spread.world_size} processes cannot share the run's {rows} rows a step evenly"
        allowed = f"a divisor of {rows // config.train.micro_batch_size}"
        raise ConfigError([Problem("distributed.processes_per_node", problem, allowed)])
    values = config.model_dump(mode="json")
    values["distributed"] = spread.model_dump()
    values["train"]["gradient_accumulation_steps"] = rows // per_pass
    return parse_config(values, config.name)


def meeting(spread: DistributedSection, environment: Mapping[str, str] = os.environ) -> Meeting:
    """Where to meet, from the environment. Raises ConfigError when several machines have no address to meet at."""
    address = _first(environment, ADDRESS)
    rank, port = _number(environment, NODE_RANK, 0) or 0, _number(environment, PORT, 1)
    if spread.nodes == 1:
        return Meeting(0, address or DEFAULT_ADDRESS, port or 0)
    if not address and spread.launcher != "slurm":
        raise _problem("ADDR", "is not set, and several machines must know where to meet", "the first machine's name")
    if rank >= spread.nodes:
        raise _problem("NODE_RANK", f"is {rank} of {spread.nodes} machines", f"0 to {spread.nodes - 1}")
    return Meeting(rank, address or DEFAULT_ADDRESS, port or DEFAULT_PORT)


def command(spread: DistributedSection, place: Meeting, job_dir: Path) -> list[str]:
    """The one command that starts this machine's processes (SLURM: all of them); not for the launcher `none`."""
    own = [MODULE, str(job_dir)]
    if spread.launcher == "torchrun":
        sizes = [f"--nnodes={spread.nodes}", f"--nproc_per_node={spread.processes_per_node}"]
        meet = [f"--node_rank={place.node_rank}", f"--master_addr={place.address}", f"--master_port={place.port}"]
        return [sys.executable, "-m", "torch.distributed.run", *sizes, *meet, "--module", *own]
    if spread.launcher == "deepspeed":
        sizes = [f"--hostfile={job_dir / HOSTS}", "--no_ssh", f"--node_rank={place.node_rank}"]
        meet = [f"--master_addr={place.address}", f"--master_port={place.port}"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *sizes, *meet, "--module", *own]
    if spread.launcher == "slurm":
        return srun(spread, [sys.executable, "-m", *own])
    raise ValueError("The launcher none starts each process by itself.")


def hosts(spread: DistributedSection) -> str:
    """What DeepSpeed's launcher reads of the machines, in the file HOSTS of the job. It calls none by these names: each
    machine starts its own processes."""
    return "".join(f"machine-{number} slots={spread.processes_per_node}\n" for number in range(spread.nodes))


def srun(spread: DistributedSection, what: list[str]) -> list[str]:
    """The srun line that starts `what` once a process; one that fails takes the others with it."""
    sizes = [f"--nodes={spread.nodes}", f"--ntasks-per-node={spread.processes_per_node}"]
    return ["srun", *sizes, "--kill-on-bad-exit=1", *what]


def rank_variables(spread: DistributedSection, place: Meeting, local_rank: int) -> dict[str, str]:
    """torch's variables of one process that the run's own job starts."""
    size = spread.processes_per_node
    return {
        "RANK": str(place.node_rank * size + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spread.world_size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }


def sbatch_script(spread: DistributedSection, name: str, train: list[str], folder: Path, on_gpu: bool = True) -> str:
    """An sbatch file: the first machine runs `train`, whose job starts every process with srun, on a GPU of its own."""
    size = spread.processes_per_node
    wanted = [f"#SBATCH --gres=gpu:{size}"] if on_gpu else []
    hidden = [] if on_gpu else ["export CUDA_VISIBLE_DEVICES="]
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={spread.nodes}",
        f"#SBATCH --ntasks-per-node={size}",
        *wanted,
        f"#SBATCH --output={folder / (name + '-%j.log')}",
        "#SBATCH --signal=TERM@120",
        "",
        "# The project's folder must be seen by every machine. Two minutes before its time is over the processes are",
        "# told to save and stop; `retune train RUN --resume auto` in such a file goes on.",
        "set -euo pipefail",
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        f"export MASTER_PORT={DEFAULT_PORT}",
        *hidden,
        f"cd {shlex.quote(str(folder))}",
        shlex.join(train),
        "",
    ]
    return "\n".join(lines)


def slurm_rank_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """torch's variables from SLURM's, for a process that srun started; {} elsewhere."""
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", DEFAULT_ADDRESS),
        "MASTER_PORT": environment.get("MASTER_PORT", str(DEFAULT_PORT)),
    }


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _number(environment: Mapping[str, str], names: tuple[str, ...], least: int) -> int | None:
    text = _first(environment, names)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise _problem(names[0], f"is {text!r}", f"a whole number from {least} on")
    return int(text)


def _problem(name: str, what: str, allowed: str) -> ConfigError:
    return ConfigError([Problem(f"${name}", what, allowed)], "environment")
