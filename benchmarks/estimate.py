"""Predicted beside measured peak memory: real short runs of the starter on this machine's processor.

    python benchmarks/estimate.py [--only lora_512 …] [--minutes 4] [--fresh] [--report]

Each cell is a run of a project in a temporary RETUNE_HOME, in a process of its own as `retune train` starts it: a
method at a length with and without gradient checkpointing on rows that fill the length, DoRA and dropout, and the
demo's preset on rows of many lengths with evaluation and samples. The peak is the largest resident set (VmHWM) that the
run stored with a step; the prediction is made from what the planner knew before the run began.

Peaks are kept in results/estimate.json as they are measured, and the next call goes on with what is missing.
Predictions are computed anew each time, with the constants of studio/estimate.py as they are now. Writes
results/estimate.md.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio import caches, datasets, estimate, forecast, runs  # noqa: E402
from studio.config import catalog  # noqa: E402
from studio.config.schema import RunConfig, parse_config  # noqa: E402
from studio.data.formats import Conversation, Message  # noqa: E402
from studio.data.identity import Identity  # noqa: E402
from studio.machine import cpu, device  # noqa: E402
from studio.paths import atomic_write_json, atomic_write_text  # noqa: E402
from studio.projects import Project, create_project  # noqa: E402

RESULTS = Path(__file__).parent / "results"
METHODS = ("lora", "qlora", "full", "prompt_tuning", "prefix_tuning")
LENGTHS = (128, 256, 512, 1024)  # of the rows that are made
MICRO_BATCH, NUM_STEPS, NUM_ROWS = 4, 4, 16
DEMO_STEPS, NUM_GENERAL, GENERAL_WORDS = 40, 96, (10, 160)
LIMIT = 0.15
WORDS = "the sun sets over a quiet harbour while boats drift home and lamps are lit one by one along the shore".split()


@dataclass(frozen=True)
class Cell:
    """A run to be measured; `is_fresh`: the planner's constants were not fitted to it."""

    config: RunConfig
    is_fresh: bool

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Measured:
    """A cell's peak in bytes beside what the planner says now."""

    cell: Cell
    peak: int
    predicted: estimate.Memory

    @property
    def error(self) -> float:
        return self.predicted.total / self.peak - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of cells, or beginnings of them")
    parser.add_argument("--minutes", type=float, default=60, help="begin no other cell after that")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--report", action="store_true", help="write the page only")
    options = parser.parse_args()
    kept = RESULTS / "estimate.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    wanted = [cell for cell in cells() if not options.only or cell.name.startswith(tuple(options.only))]
    if not options.report:
        missing = [cell for cell in wanted if options.fresh or cell.name not in found]
        for name, peak in _peaks(missing, time.monotonic() + 60 * options.minutes):
            found[name] = peak
            atomic_write_json(kept, found)
    rows = [_row(cell, found[cell.name]) for cell in cells() if cell.name in found]
    atomic_write_text(RESULTS / "estimate.md", _report(rows))
    print(_report(rows))


def cells() -> Iterator[Cell]:
    for length in (128, 512):
        for method in METHODS:
            yield from _both(method, length, is_fresh=False)
    for method in ("lora", "qlora", "full"):
        yield from _both(method, 256, is_fresh=True)
    yield from _both("lora", 1024, is_fresh=False)
    yield Cell(_config("lora", 256, "dora", lora={"dora": True}), True)
    yield Cell(_config("lora", 256, "dropout", lora={"dropout": 0.1}), True)
    yield Cell(_config("lora", 256, "one", train={"micro_batch_size": 1, "gradient_accumulation_steps": 4}), False)
    yield Cell(_demo(), False)


def _both(method: str, length: int, is_fresh: bool) -> Iterator[Cell]:
    """Without gradient checkpointing and, where the method has it, with."""
    yield Cell(_config(method, length), is_fresh)
    if method != "prefix_tuning":
        yield Cell(_config(method, length, "ckpt", train={"gradient_checkpointing": True}), is_fresh)


def _config(method: str, length: int, kind: str = "", **settings: dict[str, Any]) -> RunConfig:
    train = {
        "num_steps": NUM_STEPS, "warmup_steps": 0, "micro_batch_size": MICRO_BATCH, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
    }  # fmt: skip
    return parse_config(
        {
            "name": "_".join(filter(None, (method, str(length), kind))),
            "method": method,
            "data": {"sources": {f"rows{length}": 1.0}, "max_length": length, "valid_share": 0},
            "train": train | settings.get("train", {}),
            "lora": settings.get("lora", {}),
            "record": {"sample_prompts": [], "evaluate_every_steps": 0},
        }
    )


def _demo() -> RunConfig:
    """The demo's preset as it is, but shorter: rows of many lengths, evaluated, asked for samples."""
    values = catalog.preset("starter_lora").model_dump(mode="json")
    return parse_config(values | {"name": "demo", "train": values["train"] | {"num_steps": DEMO_STEPS}})


def _peaks(missing: list[Cell], deadline: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each run held, with the planner's load for it, as they end."""
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as home:
        os.environ["RETUNE_HOME"] = home
        project = create_project("estimate")
        _save_rows(project)
        for cell in missing:
            yield cell.name, _measured(project, cell.config)
            if time.monotonic() > deadline:
                return


def _save_rows(project: Project) -> None:
    for length in LENGTHS:
        datasets.save(project, f"rows{length}", list(_rows(length)), kind="import")
    datasets.build_identity(project, Identity("Luna", "Shane"))
    datasets.save(project, "general", list(_general()), kind="import")


def _rows(length: int) -> Iterator[Conversation]:
    """Different rows that are cut at `length` tokens: no two share a beginning, so nothing is computed once for two."""
    for number in range(NUM_ROWS):
        words = [WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(length)]
        yield Conversation((Message("user", f"{words[0]} {number}?"), Message("assistant", " ".join(words))))


def _general() -> Iterator[Conversation]:
    """Questions with answers of many lengths, where the demo has the starter's own."""
    chance = random.Random(0)
    for number in range(NUM_GENERAL):
        words = chance.choices(WORDS, k=chance.randint(*GENERAL_WORDS))
        yield Conversation(
            (Message("user", f"Tell me about {words[0]} {number}."), Message("assistant", " ".join(words)))
        )


def _measured(project: Project, config: RunConfig) -> dict[str, Any]:
    """The rows are tokenised first, as they are after a project's first run."""
    runs.wait(project.folder, caches.start(project, config.data))
    load = forecast.load_of(project, config, device())
    run, job = runs.start_run(project, config, allow_lint_errors=True)
    runs.wait(project.folder, job)
    found = forecast.outcome(project, runs.get_run(project, run.id))
    assert found is not None
    print(f"{config.name}: predicted {_mb(found.predicted_bytes)}, measured {_mb(found.measured_bytes)}", flush=True)
    return {"peak": found.measured_bytes, "load": asdict(load)}


def _row(cell: Cell, found: dict[str, Any]) -> Measured:
    load = estimate.Load(**found["load"])
    predicted = estimate.memory(cell.config, forecast.shapes_of(cell.config), load, device())
    return Measured(cell, found["peak"], predicted)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MB"


def _report(rows: list[Measured]) -> str:
    fitted, fresh = ([row for row in rows if row.cell.is_fresh is kind] for kind in (False, True))
    worst = max(abs(row.error) for row in rows)
    return "\n".join(
        [
            "# Planner: predicted and measured peak memory",
            "",
            f"`python benchmarks/estimate.py` on {cpu().name}, {os.cpu_count()} cores, {platform.system()}, bfloat16 "
            f"{'native' if cpu().has_bfloat16 else 'emulated'}: the starter model, {MICRO_BATCH} rows a step that fill "
            f"the length, {NUM_STEPS} steps. Measured: the largest resident set of the training process. No GPU was "
            "measured.",
            "",
            f"Largest error {worst:.1%}: {'within' if worst <= LIMIT else 'not within'} the promised {LIMIT:.0%}. "
            f"{_spread(rows)}",
            "",
            "## Rows that the constants of `studio/estimate.py` were fitted to",
            "",
            *_table(fitted),
            "",
            "## Rows that they were not fitted to",
            "",
            *_table(fresh),
            "",
            f"`demo`: the preset `starter_lora` for {DEMO_STEPS} steps of 16 rows of many lengths, with evaluation and "
            "samples. `one`: micro-batches of one row. `dropout` and `dora`: layers that stay as PEFT computes them. "
            "prefix_tuning forbids checkpointing. Cells that were not measured yet: "
            + (", ".join(cell.name for cell in cells() if cell.name not in {row.cell.name for row in rows}) or "none")
            + ".",
            "",
        ]
    )  # fmt: skip


def _spread(rows: list[Measured]) -> str:
    errors = [row.error for row in rows]
    low = sum(error < 0 for error in errors)
    return f"On average {sum(errors) / len(errors):+.1%}; {low} of {len(errors)} predictions are too low."


def _table(rows: list[Measured]) -> Iterator[str]:
    yield "| run | predicted | measured | error |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows:
        yield f"| {row.cell.name} | {_mb(row.predicted.total)} | {_mb(row.peak)} | {row.error:+.1%} |"


if __name__ == "__main__":
    main()
