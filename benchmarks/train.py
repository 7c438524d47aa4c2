"""Training speed, memory and losses of the studio beside TRL, LLaMA-Factory and transformers' Trainer with PEFT.

    python benchmarks/peers.py
    python benchmarks/train.py [--quick] [--only instructions ...] [--settings retune "trl best" ...]

The starter model on the CPU, LoRA of rank 16 on all linear layers (and QLoRA, and full), the same tokenised rows, the
same rows per optimizer step, the same optimizer and the same first weights for all, each tool in an environment and a
process of its own, at its defaults and at the settings that measured best. All are loaded first; then they take turns,
one round each (A B C A B C) of a few steps and ten seconds at least, after a step of warm-up: a round of a second would
measure caches that another tool has just filled. Before that the studio's gradient is compared
with that of a padded float32 reference, and later its losses with the others' on the same rows in the same order.

Every round is kept in results/train.json as it ends, so a measurement that was interrupted goes on where it was, with
the workload that was not finished (`--fresh` begins anew, `--report` only writes the page). Writes results/train.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path[:0] = [str(REPOSITORY), str(HERE)]

from peers import default_folder, is_built, python_of  # noqa: E402
from training.page import write_page  # noqa: E402
from training.tools import SETTINGS, Setting, Tool, ToolFailed  # noqa: E402
from training.workloads import WORKLOADS, Workload, examples, write  # noqa: E402

from studio.models import require  # noqa: E402
from studio.paths import atomic_write_json  # noqa: E402

RESULTS = HERE / "results"
ROUNDS, DEFAULT_ROUNDS = 3, 1
ROUND_SECONDS = 10.0  # that a round lasts at least
MOST = 20  # times a workload's steps that a round has at most, whoever is fast
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4, "full": 2e-5}
FLOAT32_TOLERANCE = 1e-5  # of the gradient, relative to its length
BFLOAT16_TOLERANCE = 2.0  # times the error that the plain padded way has in bfloat16


def main() -> None:
    options = _options()
    results = RESULTS / ("train_quick.json" if options.quick else "train.json")
    found = _found_before(results, options.fresh)
    if not options.report:
        with tempfile.TemporaryDirectory(prefix="retune-bench-") as scratch:
            Measurement(options, found, results, Path(scratch)).run()
    write_page(found, results.with_suffix(".md"))
    print(results.with_suffix(".md").read_text(encoding="utf-8"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of two workloads, to see that all works")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in WORKLOADS], help="these workloads alone")
    parser.add_argument("--settings", nargs="+", help="tools, or tool and setting: retune, trl, 'trl best'")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of best settings; defaults are in the first")
    parser.add_argument("--peers", type=Path, default=default_folder(), help="folder that peers.py made")
    parser.add_argument("--model", default="starter", help="another base model, for a look at one")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--report", action="store_true", help="write the page again from what was measured")
    return parser.parse_args()


def _found_before(path: Path, fresh: bool) -> dict[str, Any]:
    if path.is_file() and not fresh:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"workloads": {}}


class Measurement:
    """All workloads, one after the other; `found` grows and is on the disk after every round."""

    def __init__(self, options: argparse.Namespace, found: dict[str, Any], results: Path, scratch: Path) -> None:
        self._found, self._results, self._scratch = found, results, scratch
        self._model = require(options.model)
        self._is_quick, self._rounds = options.quick, 1 if options.quick else options.rounds
        self._peers = options.peers
        self._settings = [each for each in SETTINGS if _is_chosen(each, options.settings)]
        self._workloads = [each for each in WORKLOADS if not options.only or each.name in options.only]
        if options.quick:
            wanted = options.only or ["tutorial-4", "instructions"]
            self._workloads = [replace(each, steps=1) for each in self._workloads if each.name in wanted]
        self._tools: dict[Setting, Tool] = {}

    def run(self) -> None:
        todo = [each for each in self._workloads if not self._is_complete(each)]
        if not todo:
            return
        try:
            self._start()
            for workload in todo:
                self._measure(workload)
        finally:
            for tool in self._tools.values():
                tool.close()

    def _is_complete(self, workload: Workload) -> bool:
        return bool(self._found["workloads"].get(workload.name, {}).get("complete"))

    def _start(self) -> None:
        for setting in self._settings:
            if not setting.is_ours and not is_built(self._peers, setting.tool):
                sys.exit(f"{setting.tool} is not in {self._peers}: run python benchmarks/peers.py first.")
            python = Path(sys.executable) if setting.is_ours else python_of(self._peers, setting.tool)
            log = self._scratch / f"{setting.name}.log"
            self._tools[setting] = Tool(setting, python, REPOSITORY, log)
        self._found["machine"] = _machine()
        self._found["versions"] = {setting.tool: tool.versions for setting, tool in self._tools.items()}
        self._found["threads"] = {setting.tool: tool.threads for setting, tool in self._tools.items()}

    def _measure(self, workload: Workload) -> None:
        print(f"\n{workload.name}: {workload.title}", flush=True)
        num_steps = 1 + self._rounds * workload.steps * MOST
        rows = examples(workload, num_steps * workload.rows_per_step, self._model)
        job = self._job(workload, num_steps)
        write(rows, Path(job["rows"]))
        kept: dict[str, Any] = {"complete": False, "rounds": [], "failures": {}}
        kept |= {"title": workload.title, "target": workload.target, "rows_per_step": workload.rows_per_step}
        kept["lengths"] = [len(example.input_ids) for example in rows]
        kept["trained"] = [example.num_trained_tokens for example in rows]
        self._found["workloads"][workload.name] = kept
        self._check_gradient(job, kept)
        self._take_turns(workload, job, kept)
        kept["complete"] = True
        self._save()

    def _job(self, workload: Workload, num_steps: int) -> dict[str, Any]:
        return {
            "do": "train",
            "name": workload.name,
            "model": str(self._model),
            "rows": str(self._scratch / f"{workload.name}.jsonl"),
            "adapter": None if workload.method == "full" else str(self._adapter()),
            "method": workload.method,
            "rows_per_step": workload.rows_per_step,
            "max_length": workload.max_length,
            "learning_rate": LEARNING_RATES[workload.method],
            "num_steps": num_steps,
        }

    def _adapter(self) -> Path:
        """The first weights of every tool's adapter."""
        path = self._scratch / "adapter.safetensors"
        if not path.is_file():
            from training.first_adapter import write_adapter  # imports torch

            write_adapter(self._model, path)
        return path

    def _check_gradient(self, job: dict[str, Any], kept: dict[str, Any]) -> None:
        ours = next((tool for setting, tool in self._tools.items() if setting.is_ours), None)
        if ours is None:
            return
        try:
            kept["gradient"] = errors = ours.ask(job | {"do": "gradient"}, "errors")
        except ToolFailed as error:
            sys.exit(f"The studio's gradient cannot be checked: {error}")
        print("gradient: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
        kept["gradient_tolerance"] = {
            "float32": FLOAT32_TOLERANCE, "bfloat16": BFLOAT16_TOLERANCE * errors["padded bfloat16"]
        }  # fmt: skip
        for name, tolerance in kept["gradient_tolerance"].items():
            if errors.get(name, 0.0) > tolerance:
                sys.exit(f"The studio's gradient is wrong by {errors[name]:.1e} in {name} (allowed {tolerance:.1e}).")

    def _take_turns(self, workload: Workload, job: dict[str, Any], kept: dict[str, Any]) -> None:
        working: list[Setting] = []
        for setting in self._settings:
            scratch = self._scratch / workload.name / setting.name
            scratch.mkdir(parents=True)
            mine = {"setting": setting.kind, "scratch": str(scratch)}
            self._try(setting, working, kept, lambda tool, mine=mine: tool.begin(job | mine))
        for number in range(self._rounds + 1):
            for setting in [each for each in working if number <= self._rounds_of(each)]:
                self._round(setting, working, kept, number, workload)
        for setting in list(working):
            self._try(setting, working, kept, Tool.end)

    def _round(
        self, setting: Setting, working: list[Setting], kept: dict[str, Any], number: int, workload: Workload
    ) -> None:
        """Round 0 is the warm-up: one step."""
        load, seconds = os.getloadavg()[0], 0.0 if self._is_quick else ROUND_SECONDS
        shape = (_steps_of(setting, workload), seconds, workload.steps * MOST) if number else (1, 0.0, 1)
        figures = self._try(setting, working, kept, lambda tool: tool.round(*shape))
        if figures is None:
            return
        where = {"setting": setting.name, "round": number, "load": [load, os.getloadavg()[0]]}
        kept["rounds"].append(where | figures)
        self._save()
        speed = figures["tokens"]["effective"] / figures["seconds"]
        took = f"{len(figures['losses'])} steps in {figures['seconds']:.1f} s"
        told = f"{speed:8,.0f} effective tokens/s, loss {figures['losses'][-1]:.4f}, {took}"
        print(f"  round {number}, {setting.name:20} {told}", flush=True)

    def _try(self, setting: Setting, working: list[Setting], kept: dict[str, Any], what: Any) -> Any:
        """Do something with a tool; one that fails is told, and left out of the rest of the workload."""
        try:
            found = what(self._tools[setting])
            if setting not in working:
                working.append(setting)
            return found
        except ToolFailed as error:
            kept["failures"][setting.name] = str(error)
            print(f"  {setting.name} failed: {error}", flush=True)
            if setting in working:
                working.remove(setting)
            return None

    def _rounds_of(self, setting: Setting) -> int:
        return min(DEFAULT_ROUNDS, self._rounds) if setting.is_slow else self._rounds

    def _save(self) -> None:
        self._found["measured"] = time.strftime("%Y-%m-%d")
        RESULTS.mkdir(exist_ok=True)
        atomic_write_json(self._results, self._found)


def _steps_of(setting: Setting, workload: Workload) -> int:
    """Steps of a round; fewer where they take longest and decide nothing."""
    return max(1, workload.steps // 2) if setting.is_slow else workload.steps


def _is_chosen(setting: Setting, wanted: list[str] | None) -> bool:
    return not wanted or setting.tool in wanted or setting.name in wanted


def _machine() -> dict[str, Any]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)  # type: ignore[misc]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in lines.get("flags", "").split()]
    return {
        "cpu": lines.get("model name", platform.processor()),
        "flags": flags,
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


if __name__ == "__main__":
    main()
