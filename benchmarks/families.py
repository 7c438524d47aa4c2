"""Every built-in config constructed on a tiny stand-in of its architecture, and one of each family trained.

    python benchmarks/families.py [--only FAMILY] [--kept FILE --seconds N]

For each name: a model of the architecture (transformers' config class, two layers), its adapter or full weights and
its quantisation as the config says, rows in the config's template, the plan of a step as the config packs, and the
optimizer; XTuner's 576 configs, and each of the grammar's newer models with each method (names that differ only in
their rows and questions are one construction). Of those that learn from pictures or pairs of answers, 71, it is the
language model's part that is constructed, and each must say what is missing. Then, for one name of every family, three
optimizer steps, whose losses must be finite and fall below the first on repeated rows.
Architectures that transformers does not have are stood in for by Llama; the table says which.
With --kept, what was constructed is kept in FILE and not done again, so that it may be done in parts of --seconds each;
the same code must do them all. Writes benchmarks/results/families.md when all are done.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from studio.config import catalog  # noqa: E402
from studio.config.catalog import Entry  # noqa: E402
from studio.config.catalog.base_models import MODELS  # noqa: E402
from studio.config.catalog.compose import config_of  # noqa: E402
from studio.config.schema import RunConfig, parse_config  # noqa: E402
from studio.data.packing import plan_step  # noqa: E402
from studio.engine import adapters, devices  # noqa: E402
from studio.engine.loop import Trainer  # noqa: E402
from studio.engine.models.load import load_base  # noqa: E402
from tests.engine.stand_ins import examples_for, make_stand_in, underneath  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "families.md"
STEPS = 3
RATE = 1e-2  # a tiny random model shows nothing at the rates of large ones


@dataclass(frozen=True)
class Outcome:
    """What became of one construction; `losses` of its steps where it was trained."""

    problem: str = ""
    num_learning: int = 0
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


class Done:
    """Outcomes by construction and number of steps: names that differ only in their rows and questions share one."""

    def __init__(self, kept: Path | None) -> None:
        self._kept, self._found = kept, dict[tuple[str, int], Outcome]()
        lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.is_file() else []
        for key, steps, values in map(json.loads, lines):
            self._found[key, steps] = Outcome(**values)

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self._found.values())

    def of(self, entry: Entry, steps: int) -> Outcome:
        return self._found[construction(entry, steps), steps]

    def fill(self, wanted: list[tuple[Entry, int]], seconds: float) -> int:
        """Do what is not done yet for so long; returns how many are left."""
        open_ones = {(construction(entry, steps), steps): entry for entry, steps in wanted}
        print(f"{len(wanted)} configs are {len(open_ones)} different constructions", flush=True)
        left = [each for each in open_ones if each not in self._found]
        until = time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as folder:
            while left and time.monotonic() < until:
                key, steps = left.pop(0)
                self._keep(key, steps, outcome(open_ones[key, steps], Path(folder), steps))
        return len(left)

    def _keep(self, key: str, steps: int, made: Outcome) -> None:
        self._found[key, steps] = made
        if self._kept:
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, steps, asdict(made)]) + "\n")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", default="", help="a family")
    options.add_argument("--kept", type=Path, help="a file that keeps what is done")
    options.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; --kept goes on there")
    asked = options.parse_args()
    entries = [entry for entry in candidates() if asked.only in ("", entry.model.family)]
    trained_ones = one_of_each_family(entries)
    done = Done(asked.kept)
    missing = done.fill([*((each, 0) for each in entries), *((each, STEPS) for each in trained_ones)], asked.seconds)
    if missing:
        sys.exit(f"{missing} constructions are left: the same command goes on there.")
    built = [(entry, done.of(entry, 0)) for entry in entries]
    trained = [(entry, done.of(entry, STEPS)) for entry in trained_ones]
    failed = [(entry, each) for entry, each in [*built, *trained] if each.problem]
    for entry, each in failed:
        print(f"{entry.name}: {each.problem}")
    report = page(built, trained, done.seconds)
    print(report)
    if not asked.only:
        RESULTS.write_text(report, encoding="utf-8")
    sys.exit(bool(failed))


def candidates() -> list[Entry]:
    """XTuner's configs, and each newer model with each method."""
    known = list(catalog.built_in().values())
    there = {entry.line.model for entry in catalog.built_in().values()}
    newer = [
        f"{model}_{method}_alpaca_e3" for model in MODELS if model not in there for method in ("qlora", "lora", "full")
    ]
    return [*known, *(catalog.entry(name) for name in newer)]


def one_of_each_family(entries: list[Entry]) -> list[Entry]:
    """The first of each family and method's kind: an adapter where there is one."""
    found: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda each: (each.method == "full", each.name)):
        if entry.line.task == "sft":
            found.setdefault(entry.model.family, entry)
    return list(found.values())


def construction(entry: Entry, steps: int) -> str:
    """All of a config that the construction of model, plan and optimizer depends on; what is trained has its name."""
    if steps:
        return entry.name
    values = config_of(entry).model_dump(mode="json")
    kept = {section: values[section] for section in ("method", "lora", "train", "distributed")}
    data = {name: value for name, value in values["data"].items() if name not in ("sources", "recipes")}
    return json.dumps([underneath(entry.model.shape.model_type), kept, data])


@cache
def stand_in(model_type: str, root: Path) -> Path:
    return make_stand_in(root / model_type, model_type)


def tiny(entry: Entry, base: Path) -> RunConfig:
    """The entry's own config on its stand-in, short enough for it."""
    values = config_of(entry).model_dump(mode="json")
    values["model"] |= {"base": str(base), "dtype": "float32"}
    values["data"]["max_length"] = min(256, values["data"]["max_length"])
    values["train"] |= {"learning_rate": RATE, "warmup_ratio": None, "warmup_steps": 0}
    return parse_config(values)


def outcome(entry: Entry, root: Path, steps: int) -> Outcome:
    started = time.monotonic()
    try:
        made = _outcome(entry, root, steps)
    except Exception as error:  # each name is to be heard of
        made = Outcome(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return replace(made, seconds=time.monotonic() - started)


def _outcome(entry: Entry, root: Path, steps: int) -> Outcome:
    if entry.line.task != "sft" and not entry.missing:
        raise ValueError("does not say what is missing of it")
    base = stand_in(underneath(entry.model.shape.model_type), root)
    config, device = tiny(entry, base), torch.device("cpu")
    devices.seed_all(config.train.seed)
    loaded = load_base(
        base,
        dtype=torch.float32,
        bits=4 if config.method == "qlora" else 0,
        device=device,
        template=config.data.template,
    )
    trainer = Trainer(adapters.attach(loaded, config), config, torch.float32, max(steps, 4), loaded.pad_id)
    is_text = config.data.template == "none"
    rows = examples_for(loaded, is_text, config.data.max_length)
    plan = plan_step(rows, config.data.pack, config.data.max_length, config.train.micro_batch_size)
    assert plan
    losses = []
    for number in range(1, steps + 1):
        losses.append(trainer.step(rows, number).loss)
    if steps and not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"losses {losses}")
    learning = sum(each.numel() for each in adapters.trainable_parameters(trainer.model))
    return Outcome("", learning, tuple(losses))


def page(built: list[tuple[Entry, Outcome]], trained: list[tuple[Entry, Outcome]], seconds: float) -> str:
    sound = [entry for entry, each in built if not each.problem]
    parts = sum(entry.line.task != "sft" for entry in sound)
    lines = [
        "# Every family on a tiny stand-in", "",
        f"`python benchmarks/families.py`: {len(sound)} of {len(built)} configs constructed "
        f"({dict(Counter(entry.method for entry in sound))}; of {parts} the language model's part), "
        f"{sum(not each.problem for _entry, each in trained)} of {len(trained)} families trained for {STEPS} steps, "
        f"{seconds:.0f} s on {platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}.", "",
        "| family | config | architecture | stand-in | weights that learn | losses |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for entry, each in trained:
        kind = entry.model.shape.model_type
        losses = each.problem or " → ".join(f"{loss:.3f}" for loss in each.losses)
        name = f"`{entry.name}`"
        lines.append(
            f"| {entry.model.family} | {name} | {kind} | {underneath(kind)} | {each.num_learning:,} | {losses} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
