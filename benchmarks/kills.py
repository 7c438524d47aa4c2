"""Kill a training run at every fault point and at random moments; does each resume end bit-equal?

`python benchmarks/kills.py [--random 50] [--minutes 4] [--fresh]`. A tiny Llama on the CPU in float32, LoRA with
dropout, real processes that end by SIGKILL. Each kill has a run of its own: it begins, is killed, is resumed, and must
leave what an uninterrupted run leaves: weights, optimizer, generators, every number and sample, the same files.

A random moment is a random step, and a random delay after it has begun, up to the time from one step to the next: so
it falls into the step, into what follows it (evaluating, sampling, saving), or into the beginning of the next one.

Each kill is kept in results/kills.json as it is made, and the next call goes on with what is missing, as long as the
code is the same. Writes results/kills.md.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from studio.paths import atomic_write_json, atomic_write_text  # noqa: E402

PACKAGE, RESULTS = REPOSITORY / "studio", REPOSITORY / "benchmarks" / "results"

NUM_STEPS = 12
SETTINGS = {
    "data": {"sources": {"identity": 0.5, "general": 0.5}, "max_length": 128, "valid_share": 0.1},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "train": {
        "num_steps": NUM_STEPS, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "warmup_steps": 1,
    },
    "record": {
        "save_every_steps": 2, "save_every_minutes": 0, "evaluate_every_steps": 2, "sample_every_steps": 4,
        "sample_max_new_tokens": 4, "best_by": "valid_loss",
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=50, help="kills at random moments")
    parser.add_argument("--minutes", type=float, default=60, help="begin no other kill after that")
    parser.add_argument("--fresh", action="store_true", help="forget the kills that were made before")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as home:
        from tests.engine import kills

        os.environ |= {"RETUNE_HOME": home, "RETUNE_MODELS": f"{home}/models"}
        trials = Trials(Path(home))
        found = Found(kills.points_of(trials.trace), {} if options.fresh else _kept())
        for _ in found.gather(trials, options.random):
            atomic_write_json(RESULTS / "kills.json", found.kept())
            atomic_write_text(RESULTS / "kills.md", found.report())
            if time.monotonic() > deadline:
                break
    print(found.report())


def _kept() -> dict[str, Any]:
    """What earlier calls found with the same code."""
    path = RESULTS / "kills.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("code") == code_of(PACKAGE) else {}


def code_of(folder: Path) -> str:
    """A fingerprint of all code in a folder, Python and C++: sha256 of names and contents, in hex."""
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


class Trials:
    """One uninterrupted run, and as many broken ones as are asked for, in one project."""

    def __init__(self, home: Path) -> None:
        from studio.config.schema import parse_config
        from studio.projects import create_project
        from tests.engine.conftest import add_dataset, conversations
        from tests.engine.folders import make_base

        base = make_base(home / "base")
        self.config = parse_config({"name": "tiny", "model": {"base": str(base), "dtype": "float32"}, **SETTINGS})
        self.project = create_project("kills")
        add_dataset(self.project, "identity", conversations(24))
        add_dataset(self.project, "general", conversations(8, subject="garden"))
        self.trace = home / "trace"
        self.whole = self._whole()

    def killed_at(self, point: str, number: int) -> str:
        """What is wrong after a kill there and a resume; empty when nothing is."""
        from tests.engine import kills

        run_id = self._new_run()
        process = kills.live(kills.lives(), self.project, run_id, f"kill@{point}:{number}")
        process.join()
        if process.exitcode != -9:
            return f"the kill at {point}, time {number}, did not happen"
        return self._resumed(run_id)

    def killed_in(self, step: int, share: float) -> tuple[int, str]:
        """A kill when that share of the time from the beginning of a step to the next one has gone by.

        Returns (the last step stored when it came, -1 when the run had ended before; what is wrong after a resume).
        """
        from studio.store import open_db, runs
        from tests.engine import kills

        run_id, trace = self._new_run(), self.trace.with_name("moments")
        trace.unlink(missing_ok=True)
        process = kills.live(kills.lives(), self.project, run_id, trace=trace)
        while process.is_alive() and self._begun(trace) < step:
            time.sleep(0.003)
        time.sleep(share * self.step_seconds)
        process.kill()
        process.join()
        with open_db(self.project.folder) as db:
            reached = runs.get(db, run_id).step if process.exitcode == -9 else -1
        return reached, self._resumed(run_id)

    @staticmethod
    def _begun(trace: Path) -> int:
        """Steps that a run has begun, by the fault points that it passed."""
        return trace.read_text(encoding="utf-8").splitlines().count("step") if trace.is_file() else 0

    def _whole(self) -> dict:
        from tests.engine import kills

        kills.finish(kills.lives(), self.project, self._new_run())  # tokens are stored, the modules imported
        run_id = self._new_run()
        process = kills.live(kills.lives(), self.project, run_id, trace=self.trace)
        began: list[float] = []
        while process.is_alive():
            began += [time.monotonic()] * (self._begun(self.trace) - len(began))
            time.sleep(0.003)
        process.join()
        self.step_seconds = (began[-1] - began[0]) / (NUM_STEPS - 1)
        return kills.outcome(self.project, run_id)

    def _resumed(self, run_id: str) -> str:
        from tests.engine import kills

        kills.finish(kills.lives(), self.project, run_id)
        wrong = kills.differences(self.whole, kills.outcome(self.project, run_id))
        return "; ".join(wrong[:3])

    def _new_run(self) -> str:
        from tests.engine.conftest import add_run

        return add_run(self.project, self.config)


class Found:
    """What the kills left so far, and the page that says so."""

    def __init__(self, points: dict[str, int], kept: dict[str, Any]) -> None:
        self.points = points
        # Of each random moment the last step stored when it came (-1: the run had ended before), and what was wrong.
        self.moments: list[tuple[int, str]] = [(step, wrong) for step, wrong in kept.get("moments", [])]
        before = kept.get("named", {})
        self.named = {
            point: {int(number): wrong for number, wrong in before.get(point, {}).items()} for point in points
        }

    @property
    def random(self) -> list[tuple[int, str]]:
        return [moment for moment in self.moments if moment[0] >= 0]

    @property
    def late(self) -> list[str]:
        return [wrong for step, wrong in self.moments if step < 0]

    def kept(self) -> dict[str, Any]:
        return {"code": code_of(PACKAGE), "moments": self.moments, "named": self.named}

    def gather(self, trials: Trials, num_random: int) -> Iterator[None]:
        """Make what is missing, one kill after the other. A moment that came too late is followed by another."""
        while len(self.random) < num_random:
            chance = random.Random(f"moment {len(self.moments)}")
            step, wrong = trials.killed_in(chance.randint(1, NUM_STEPS), chance.random())
            print(f"random: step {step} {wrong or 'bit-equal'}", flush=True)
            self.moments.append((step, wrong))
            yield
        for point, times in self.points.items():
            for number in sorted({1, (times + 1) // 2, times} - self.named[point].keys()):
                wrong = self.named[point][number] = trials.killed_at(point, number)
                print(f"{point}: time {number} of {times} {wrong or 'bit-equal'}", flush=True)
                yield

    def report(self) -> str:
        import torch

        named = [wrong for found in self.named.values() for wrong in found.values()]
        wrong = [text for text in [*named, *(text for _, text in self.random)] if text]
        driven, kills = sum(map(bool, self.named.values())), len(named) + len(self.random)
        return "\n".join(
            [
                "# Killed and resumed",
                "",
                f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, Python "
                f"{platform.python_version()}, torch {torch.__version__}; CPU, float32, one thread. Made by "
                "`python benchmarks/kills.py`.",
                "",
                f"A run of {NUM_STEPS} steps (LoRA with dropout; a checkpoint and an evaluation every 2 steps, samples "
                "every 4, the best checkpoint kept) is killed by SIGKILL and resumed. Compared with a run that was "
                "left alone, to the last bit: weights, optimizer, scaler, random generators, place in the data, "
                "counters, every stored number and sample (none lost, none doubled), the rows of checkpoints, and the "
                "names of files left.",
                "",
                f"**{kills} kills, {kills - len(wrong)} bit-equal, {len(wrong)} not.** {len(self.random)} at random "
                f"moments, {len(named)} at {driven} of {len(self.points)} fault points.",
                "",
                *self._random_lines(),
                "",
                "| fault point | passed in a run | killed at time | resumed |",
                "| --- | --- | --- | --- |",
                *self._point_lines(),
                "",
            ]
        )

    def _random_lines(self) -> Iterator[str]:
        reached = ", ".join(str(step) for step, _ in self.random)
        yield f"Random moments: the last step stored when the kill came was {reached}."
        yield from (f"Not bit-equal after a kill at step {step}: {wrong}." for step, wrong in self.random if wrong)
        if self.late:
            changed = sum(map(bool, self.late))
            yield f"{len(self.late)} more came after the run had ended; going on changed something in {changed}."

    def _point_lines(self) -> Iterator[str]:
        for point, found in self.named.items():
            wrong = "; ".join(f"time {number}: {text}" for number, text in found.items() if text)
            verdict = wrong or ("bit-equal" if found else "not driven")
            yield f"| {point} | {self.points[point]} | {', '.join(map(str, found))} | {verdict} |"


if __name__ == "__main__":
    main()
