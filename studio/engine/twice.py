"""Whether activations are computed twice (gradient checkpointing), where that is left to the memory that is free."""

import psutil
import torch

from studio import estimate, loads
from studio.config.schema import RunConfig
from studio.engine.batches import Corpus
from studio.engine.models.load import LoadedModel
from studio.estimate import Twice
from studio.machine import Device, free_bytes, has_compiler
from studio.model_shapes import read_shapes
from studio.paths import human_bytes


def choose(config: RunConfig, loaded: LoadedModel, dtype: torch.dtype, corpus: Corpus) -> Twice:
    """What train.gradient_checkpointing auto comes to, here and now: the planner's numbers against free memory.

    The model is loaded already; what it holds counts as free, for the planner counts it too.
    """
    device = Device(loaded.device.type, "", 0, dtype != torch.float32, has_compiler())
    shapes, load = read_shapes(loaded.folder), loads.counted(config, corpus.train, device)
    free = _free_on_gpu(loaded.device) if device.kind == "cuda" else _free_here(estimate.processes_on(config, device))
    return estimate.twice(config, shapes, load, device, free)


def told(choice: Twice) -> str:
    """The choice as a line of the log."""
    needs = f"a step may take {human_bytes(choice.without)} without, {human_bytes(choice.budget)} are free"
    if choice.is_on:
        return f"gradient checkpointing is on: {needs}; with it about {human_bytes(choice.computed_twice)}"
    return f"gradient checkpointing is off: {needs}"


def _free_on_gpu(device: torch.device) -> int:
    """With the process's context, which is there already and which the planner counts."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) + estimate.OVERHEAD["cuda"].fixed


def _free_here(num_processes: int) -> int:
    """A process's part of main memory. Pages of the model's files are free already: the system may drop them."""
    held = psutil.Process().memory_info()
    return free_bytes() // num_processes + held.rss - getattr(held, "shared", 0)
