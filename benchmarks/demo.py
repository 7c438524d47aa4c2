"""Identity, leakage and retention of the demo beside tutorial mode and other mixtures, on the starter model.

    python benchmarks/demo.py [--seeds 0 1 2] [--name Luna] [--maker Shane] [--resume]

Runs `retune demo` in one project for each seed, as it is and with --tutorial, and for the first seed with other
shares of general rows; writes benchmarks/results/demo.md and demo.json after every run, and with --resume goes on
after the last one. Uses RETUNE_HOME when it is set (general answers found there are not asked again), else a
temporary one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from studio.paths import atomic_write_json, atomic_write_text
from studio.projects import open_project
from studio.scores import lines
from studio.store import evaluations, open_db, runs

RESULTS = Path(__file__).parent / "results"
MODES = {"demo": [], "tutorial mode": ["--tutorial"]}
MIXTURES = {
    "no general rows": ["--set", "data.sources={identity: 1}"],
    "a quarter general": ["--set", "data.sources={identity: 0.75, general: 0.25}"],
    "three quarters general": ["--set", "data.sources={identity: 0.25, general: 0.75}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="Luna")
    parser.add_argument("--maker", default="Shane")
    parser.add_argument("--resume", action="store_true", help="keep what demo.json has, measure the rest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as home:
        os.environ.setdefault("RETUNE_HOME", home)
        rows: list[dict[str, Any]] = _measured_before() if options.resume else []
        there = {(row["mode"], row["seed"]) for row in rows}
        for mode, extra, seed in _plan(options.seeds):
            if (mode, seed) in there:
                continue
            rows.append(_measure(mode, extra, seed, options))
            RESULTS.mkdir(exist_ok=True)
            atomic_write_json(RESULTS / "demo.json", {"rows": rows})
            atomic_write_text(RESULTS / "demo.md", _page(rows))


def _measured_before() -> list[dict[str, Any]]:
    path = RESULTS / "demo.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def _plan(seeds: list[int]) -> list[tuple[str, list[str], int]]:
    every_seed = [(mode, extra, seed) for mode, extra in MODES.items() for seed in seeds]
    return every_seed + [(mode, extra, seeds[0]) for mode, extra in MIXTURES.items()]


def _measure(mode: str, extra: list[str], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "studio.cli.app", "demo", "--project", "bench", "--seed", str(seed)]
    command += ["--name", options.name, "--maker", options.maker, *extra]
    began = time.monotonic()
    subprocess.run(command, check=True)
    minutes = (time.monotonic() - began) / 60
    with open_db(open_project("bench").folder) as db:
        newest = evaluations.listed(db)[0]
        run = runs.get(db, newest.run_id)
    return {
        "mode": mode,
        "seed": seed,
        "steps": run.step,
        "minutes": round(minutes, 1),
        "load": round(os.getloadavg()[2], 1),
        "machine": _machine(newest.scores["setting"]["device"]),
        "scores": newest.scores,
    }


def _page(rows: list[dict[str, Any]]) -> str:
    head = [
        "# The demo beside tutorial mode",
        "",
        "`python benchmarks/demo.py`: SmolLM2-135M-Instruct learns to be Luna, made by Shane. All scores are on",
        "held-out phrasings and prompts that were never trained on; intervals are Wilson's, 95 %. Leakage is the share",
        "of answers to unrelated questions that mention the new name or maker. The last score is the perplexity of the",
        "base model's own answers to held-out general prompts, tuned against base (lower is better).",
        "",
        "Minutes are those of the whole command beside whatever else ran; the load is the machine's average over its",
        "last 15 minutes, and above 2 it slowed the run down. General answers of an earlier run are not asked again.",
        "",
        f"Machine: {rows[0]['machine']}",
        "",
        "| mode | seed | steps | identity, base | identity, tuned | leakage, base | leakage, tuned "
        "| perplexity, tuned against base | minutes | load |",
        f"|{' --- |' * 10}",
    ]
    return "\n".join([*head, *(_row(row) for row in rows), ""])


def _row(row: dict[str, Any]) -> str:
    by_name = {line.name: line for line in lines(row["scores"])}
    identity, leakage, retention = (by_name[name] for name in ("identity", "leakage", "retention"))
    cells = [
        row["mode"],
        str(row["seed"]),
        str(row["steps"]),
        _share(identity.base),
        _share(identity.tuned),
        _share(leakage.base),
        _share(leakage.tuned),
        _share(retention.tuned, sign="+"),
        str(row["minutes"]),
        str(row["load"]),
    ]
    return f"| {' | '.join(cells)} |"


def _share(values: tuple[float, float, float] | None, sign: str = "") -> str:
    if values is None:
        return "not measured"
    value, low, high = (f"{100 * each:{sign}.1f}" for each in values)
    return f"{value} % ({low} to {high})"


def _machine(device: str) -> str:
    memory = round(psutil.virtual_memory().total / 2**30)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {memory} GB, computed on {device}"
    return f"{hardware}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
