"""Run by `tests/engine/test_distributed.py` in two processes: the same steps under every strategy, numbers to a file.

argv: model folder, output file, names of cases. A case: strategy-method-pack-dtype, as zero2-lora-tree-float32; the
strategy `short` is ddp with a process that runs out of memory, `unmade` before a case has one that does so while it
makes a step's batches, and `ill` before a case has mishaps in one process.
"""

import contextlib
import errno
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from studio import faults
from studio.config.schema import RunConfig, parse_config
from studio.data.tokens import Example
from studio.engine import adapters, devices
from studio.engine.adapters import trainable_parameters
from studio.engine.distributed import Alone, ranks_of
from studio.engine.loop import NotFiniteError, StepResult, Trainer
from studio.engine.memory_full import MemoryFullError, until_it_fits
from studio.engine.models.load import load_base

NUM_STEPS, ROWS = 20, 8


def config_of(model: Path, case: str, world: int) -> RunConfig:
    strategy, method, pack, dtype = case.split("-")
    zero = strategy.startswith("zero")
    spread = {"strategy": "deepspeed" if zero else strategy, "deepspeed": strategy if zero else "zero2"}
    return parse_config(
        {
            "method": method,
            "model": {"base": str(model), "dtype": dtype},
            "lora": {"rank": 4, "alpha": 16},
            "data": {"pack": pack, "max_length": 96},
            "train": {
                "num_steps": NUM_STEPS,
                "warmup_steps": 2,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": ROWS // 2 // world,
                "learning_rate": 0.002,
                "weight_decay": 0.01,
            },
            "distributed": {**spread, "processes_per_node": world},
        }
    )


def rows_of(step: int) -> list[Example]:
    """Rows of different lengths, some with a common beginning, some all the same."""
    generator = torch.Generator().manual_seed(step)
    shared = torch.randint(3, 250, (8,), generator=generator).tolist()
    rows = []
    for number in range(ROWS):
        own = torch.randint(3, 250, (6 + 5 * (number % 4),), generator=generator).tolist()
        ids = (shared if number % 2 else []) + (own if number < 6 else rows[0].input_ids)
        rows.append(Example(ids, [-100, -100, *ids[2:]]))
    return rows


def start(model: Path, case: str, world: int) -> Trainer:
    """The model of a case, ready to train together with the other processes."""
    config = config_of(model, case, world)
    devices.seed_all(0)
    dtype = devices.DTYPES[config.model.dtype]
    weights_dtype = torch.float32 if config.method == "full" else dtype
    ranks = ranks_of(config)
    bits = 4 if config.method == "qlora" else 0
    loaded = load_base(model, dtype=weights_dtype, device=torch.device("cpu"), bits=bits)
    trainer = Trainer(adapters.attach(loaded, config), config, dtype, NUM_STEPS, loaded.pad_id, ranks)
    ranks.join(torch.device("cpu"))
    return trainer


def steps(trainer: Trainer, first: int, end: int) -> list[StepResult]:
    return [trainer.step(rows_of(step), step + 1) for step in range(first, end)]


def train(model: Path, case: str, world: int) -> dict[str, Any]:
    """Losses, norms and final learned weights of a case."""
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    results = steps(trainer, 0, NUM_STEPS)
    return {
        "num_learned": trainer.ranks.num_learned(trainable_parameters(trainer.model)),
        "losses": [each.loss for each in results],
        "norms": [each.grad_norm for each in results],
        "tokens": [each.num_tokens for each in results],
        "trained": [each.num_trained_tokens for each in results],
        "valid": trainer.evaluate(rows_of(99)),
        "weights": learned(trainer.model, trainer.ranks),
    }


def resume(model: Path, case: str, world: int, folder: Path) -> dict[str, Any]:
    """As `train`, but saved after half of the steps, and gone on with from the files by a model made anew."""
    half = NUM_STEPS // 2
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    steps(trainer, 0, half)
    only_learned = adapters.is_adapter(trainer.model)
    path = folder / case / f"step_{half}.pth"
    trainer.ranks.save(path, {}, only_learned)
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    trainer.ranks.load(path, only_learned)
    results = steps(trainer, half, NUM_STEPS)
    weights = learned(trainer.model, trainer.ranks)
    return {"losses": [each.loss for each in results], "weights": weights, "folder": str(path)}


def short_of_memory(model: Path, case: str, world: int) -> dict[str, Any]:
    """As `train`, but the second process runs out of memory in the middle of the third step, and of an evaluation."""
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    results = steps(trainer, 0, 2)
    whole, calls = trainer.forward.backward, []

    def backward(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if trainer.ranks.rank == 1 and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*arguments)

    trainer.forward.backward = backward
    results += [
        until_it_fits(trainer, lambda number=number: trainer.step(rows_of(number), number + 1))
        for number in range(2, NUM_STEPS)
    ]
    sizes = trainer.ranks.gather(torch.tensor(trainer.micro_batch_size))
    return {"losses": [each.loss for each in results], "sizes": [int(each) for each in sizes],
            "valid": valid_at_second_try(trainer), "weights": learned(trainer.model, trainer.ranks)}  # fmt: skip


def without_batches(model: Path, case: str, world: int) -> dict[str, Any]:
    """As `train`, but the second process runs out of memory while it makes batches: those of the fourth step once, and
    after the last step always. `sizes`: of micro-batches, -1 where a process did not learn then that one example is too
    much."""
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    results = steps(trainer, 0, 3)
    whole, failing = trainer.forward.batches, [trainer.ranks.rank == 1]

    def batches(*arguments: Any) -> Any:
        if failing[0]:
            failing[0] = always
            raise MemoryError
        return whole(*arguments)

    always, trainer.forward.batches = False, batches
    results += [
        until_it_fits(trainer, lambda number=number: trainer.step(rows_of(number), number + 1))
        for number in range(3, NUM_STEPS)
    ]
    size, weights = trainer.micro_batch_size, learned(trainer.model, trainer.ranks)
    always, failing[0] = True, trainer.ranks.rank == 1
    with contextlib.suppress(MemoryFullError):
        until_it_fits(trainer, lambda: trainer.step(rows_of(50), NUM_STEPS))
        size = -1
    sizes = trainer.ranks.gather(torch.tensor(size))
    return {"losses": [each.loss for each in results], "sizes": [int(each) for each in sizes], "weights": weights}


def valid_at_second_try(trainer: Trainer) -> float:
    whole, calls = trainer.forward.loss, []

    def loss(*arguments: Any) -> float:
        calls.append(arguments)
        if trainer.ranks.rank == 1 and len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*arguments)

    trainer.forward.loss, trainer.micro_batch_size = loss, 2
    return until_it_fits(trainer, lambda: trainer.evaluate(rows_of(99)))


def mishaps(model: Path, case: str, world: int, folder: Path) -> dict[str, Any]:
    """As `train`, but one process has a NaN gradient once, a full disk in the middle of a save, a bad weight.

    `went_bad`, `refused`, `sound`, `spoilt` are what each process found: the step was not taken, the save was given up,
    all weights were finite before the end, and after it.
    """
    trainer = start(model, case, world)
    trainer.join(trainer.ranks)
    ranks, half, path = trainer.ranks, NUM_STEPS // 2, folder / case / "ill" / "step_1.pth"
    results = steps(trainer, 0, 2)
    went_bad = bad_step(trainer)
    results += steps(trainer, 2, half)
    faults.arm("full@write zero_pp_rank_N_mp_rank_N_optim_states.pt:2" if ranks.rank else "")
    refused = not is_saved(trainer, path)
    faults.arm("")
    saved = is_saved(trainer, path)
    results += steps(trainer, half, NUM_STEPS)
    weights = trainable_parameters(trainer.model)
    found = [went_bad, refused, saved, ranks.are_finite(weights)]
    if ranks.rank:
        own = getattr(weights[0], "ds_tensor", weights[0]).data
        own.view(-1)[0] = math.inf
    told = ranks.gather(torch.tensor([*found, not ranks.are_finite(weights)]))
    return {"losses": [each.loss for each in results], "found": [each.tolist() for each in told]}


def bad_step(trainer: Trainer) -> bool:
    real = trainer.ranks.backward
    if trainer.ranks.rank:
        trainer.ranks.backward = lambda last, batch, num_trained, pieces: real(last, batch, math.nan, pieces)
    try:
        trainer.step(rows_of(50), 3)
    except NotFiniteError:
        return True
    finally:
        trainer.ranks.backward = real
    return False


def is_saved(trainer: Trainer, path: Path) -> bool:
    try:
        trainer.ranks.save(path, {}, adapters.is_adapter(trainer.model))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return False
    return True


def learned(model: torch.nn.Module, ranks: Alone) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if ranks.partitions_weights:
                from deepspeed.runtime.zero.partition_parameters import GatheredParameters

                with GatheredParameters([parameter]):
                    found[name] = parameter.detach().float().clone()
            else:
                found[name] = parameter.detach().float().clone()
    return found


def main(model: str, out: str, *cases: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for case in cases:
        if case.startswith("short-"):
            found[case] = short_of_memory(Path(model), case.replace("short", "ddp"), world)
            continue
        if case.startswith("unmade-"):
            found[case] = without_batches(Path(model), case.removeprefix("unmade-"), world)
            continue
        if case.startswith("ill-"):
            found[case] = mishaps(Path(model), case.removeprefix("ill-"), world, Path(out).parent)
            continue
        found[case] = train(Path(model), case, world)
        if case.startswith("zero") and not case.endswith("bfloat16"):
            found[case]["resumed"] = resume(Path(model), case, world, Path(out).parent)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
