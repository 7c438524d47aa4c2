"""Predicted beside measured peak memory: real short runs of the starter on this machine's processor.

    python benchmarks/estimate.py [--methods lora full] [--lengths 128 512]

For each method, length and with or without gradient checkpointing a project of a temporary RETUNE_HOME trains two steps
on rows that fill the length, in a process of its own, as `retune train` does. The peak is the largest resident set of
that process (VmHWM), the prediction the one that was stored with the run before it began. Writes
benchmarks/results/estimate.md.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio import caches, datasets, forecast, runs  # noqa: E402
from studio.config.schema import RunConfig, parse_config  # noqa: E402
from studio.data.formats import Conversation, Message  # noqa: E402
from studio.machine import cpu  # noqa: E402
from studio.paths import atomic_write_text  # noqa: E402
from studio.projects import Project, create_project  # noqa: E402

RESULT = Path(__file__).parent / "results" / "estimate.md"
METHODS = ("lora", "qlora", "full", "prompt_tuning", "prefix_tuning")
MICRO_BATCH, NUM_STEPS, NUM_ROWS = 4, 2, 16
LIMIT = 0.15
WORDS = "the sun sets over a quiet harbour while boats drift home and lamps are lit one by one along the shore".split()


@dataclass(frozen=True)
class Row:
    config: RunConfig
    outcome: forecast.Outcome

    @property
    def error(self) -> float:
        return self.outcome.memory_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as home:
        os.environ["RETUNE_HOME"] = home
        project = create_project("estimate")
        rows = [_measured(project, config) for config in _configs(project, options.methods, options.lengths)]
    text = _report(rows)
    RESULT.parent.mkdir(exist_ok=True)
    atomic_write_text(RESULT, text)
    print(text)


def _configs(project: Project, methods: list[str], lengths: list[int]) -> Iterator[RunConfig]:
    for length in lengths:
        name = f"rows{length}"
        datasets.save(project, name, list(_rows(length)), kind="import")
        for method in methods:
            for checkpointing in (False, True):
                if method != "prefix_tuning" or not checkpointing:
                    yield _config(name, method, length, checkpointing)


def _rows(length: int) -> Iterator[Conversation]:
    """Different rows that are cut at `length` tokens: no two share a beginning, so nothing is computed once for two."""
    for number in range(NUM_ROWS):
        words = [WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(length)]
        yield Conversation((Message("user", f"{words[0]} {number}?"), Message("assistant", " ".join(words))))


def _config(name: str, method: str, length: int, checkpointing: bool) -> RunConfig:
    return parse_config(
        {
            "name": f"{method}_{length}{'_ckpt' * checkpointing}",
            "method": method,
            "data": {"sources": {name: 1.0}, "max_length": length, "valid_share": 0},
            "train": {
                "num_steps": NUM_STEPS, "warmup_steps": 0, "micro_batch_size": MICRO_BATCH,
                "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "gradient_checkpointing": checkpointing,
            },
            "record": {"sample_prompts": [], "evaluate_every_steps": 0},
        }
    )  # fmt: skip


def _measured(project: Project, config: RunConfig) -> Row:
    """The rows are tokenised first, as they are after a project's first run."""
    runs.wait(project.folder, caches.start(project, config.data))
    run, job = runs.start_run(project, config, allow_lint_errors=True)
    runs.wait(project.folder, job)
    found = forecast.outcome(project, runs.get_run(project, run.id))
    assert found is not None
    print(f"{config.name}: predicted {_mb(found.predicted_bytes)}, measured {_mb(found.measured_bytes)} "
          f"({found.memory_error:+.1%}) {run.detail['predicted']['memory']}", flush=True)  # fmt: skip
    return Row(config, found)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MB"


def _report(rows: list[Row]) -> str:
    worst = max(abs(row.error) for row in rows)
    lines = [
        "# Planner: predicted and measured peak memory",
        "",
        f"`python benchmarks/estimate.py` on {cpu().name}, {os.cpu_count()} cores, {platform.system()}, bfloat16 "
        f"{'native' if cpu().has_bfloat16 else 'emulated'}: the starter model, {MICRO_BATCH} rows a step that fill the "
        f"length, {NUM_STEPS} steps. Measured: the largest resident set of the training process. No GPU was measured.",
        "",
        "| method | tokens a row | checkpointing | predicted | measured | error |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        config, outcome = row.config, row.outcome
        lines.append(
            f"| {config.method} | {config.data.max_length} | {'yes' if config.train.gradient_checkpointing else 'no'} "
            f"| {_mb(outcome.predicted_bytes)} | {_mb(outcome.measured_bytes)} | {row.error:+.1%} |"
        )
    verdict = "within" if worst <= LIMIT else "not within"
    words = f"Largest error {worst:.1%}: {verdict} the promised {LIMIT:.0%}."
    lines += ["", f"{words} prefix_tuning forbids checkpointing."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
