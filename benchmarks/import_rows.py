"""How fast and in how much memory a million Alpaca-like rows become a dataset, beside `datasets.load_dataset("json")`.

    python benchmarks/import_rows.py [--rows 1000000]

The same rows as JSONL and as one JSON list. The studio's time is that of the whole job, from its start to a registered
version: copying the source, checking each row, converting it, writing it and its fingerprint. load_dataset reads the
file into its Arrow cache, unchecked and unconverted, in a process of its own with an empty cache. Peak memory is the
most that was resident. Writes benchmarks/results/import_rows.md.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio import datasets, jobs  # noqa: E402
from studio.paths import atomic_write_text  # noqa: E402
from studio.projects import Project, create_project  # noqa: E402

RESULT = Path(__file__).parent / "results" / "import_rows.md"
TARGET_BYTES = 1.5 * 2**30
WORDS = [f"{sound}{end}" for sound in ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti") for end in ("n", "rel", "ster")]
LOAD = """
import resource, sys, time
began = time.perf_counter()
import datasets
rows = datasets.load_dataset("json", data_files=sys.argv[1], cache_dir=sys.argv[2], split="train")
print(len(rows), time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclass(frozen=True)
class Measured:
    """One way through one file."""

    rows: int
    seconds: float
    peak_bytes: float

    def cells(self) -> list[str]:
        return [f"{self.seconds:.1f}", f"{self.rows / self.seconds:,.0f}", f"{self.peak_bytes / 2**20:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    lines = []
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as home:
        os.environ["RETUNE_HOME"] = home
        project = create_project("Rows")
        for kind, path in (("JSONL", Path(home) / "rows.jsonl"), ("JSON list", Path(home) / "rows.json")):
            write_rows(path, options.rows)
            ours, theirs = import_by_job(project, path), load(path, Path(home) / f"cache-{kind[:5]}")
            lines += _lines(kind, path.stat().st_size, ours, theirs)
    page = "\n".join([*_head(options.rows, load_before), *lines, ""])
    atomic_write_text(RESULT, page)
    print(page)


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of about 400 bytes, half of them with an input, no two alike."""
    dice, as_list = random.Random(0), path.suffix == ".json"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            text = [" ".join(dice.choices(WORDS, k=count)) for count in (10, 8 * (number % 2), 45)]
            row = {"instruction": f"{number}. {text[0]}", "input": text[1], "output": text[2]}
            lead = ("[" if number == 0 else ",\n") if as_list else ""
            file.write(f"{lead}{json.dumps(row)}{'' if as_list else chr(10)}")
        file.write("]" if as_list else "")


def import_by_job(project: Project, path: Path) -> Measured:
    began = time.perf_counter()
    job = datasets.start_import(project, path, "rows")
    peak = 0.0
    while job.live:
        peak = max(peak, _peak(job.pid))
        time.sleep(0.1)
        job = jobs.get(project.folder, job.id)
    if job.state != "finished":
        sys.exit(f"the import {job.state}: {job.cause}")
    return Measured(job.result["num_rows"], time.perf_counter() - began, peak)


def _peak(pid: int) -> float:
    """The most memory of a process so far, in bytes; 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((1024.0 * int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")), 0)


def load(path: Path, cache: Path) -> Measured:
    command = [sys.executable, "-c", LOAD, str(path), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, seconds, peak = done.stdout.split()
    return Measured(int(rows), float(seconds), float(peak))


def _head(num_rows: int, load_before: float) -> list[str]:
    return [
        f"# Importing {num_rows:,} rows",
        "",
        "`python benchmarks/import_rows.py`. The studio copies the source, checks and converts each row, and writes it",
        "with a fingerprint; `load_dataset` reads the same file into its Arrow cache, unchecked and unconverted.",
        "",
        f"Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB memory; Python {platform.python_version()}. Load average "
        f"{load_before:.1f} before and {os.getloadavg()[0]:.1f} after: above 1 is other work, which slows both.",
        "",
        "| file | size, MB | by | seconds | rows a second | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


def _lines(kind: str, size: int, ours: Measured, theirs: Measured) -> list[str]:
    met = "met" if ours.peak_bytes < TARGET_BYTES else "missed"
    file = [kind, f"{size / 2**20:,.0f}"]
    return [
        f"| {' | '.join([*file, 'retune data import', *ours.cells()])} |",
        f"| {' | '.join([*file, 'datasets.load_dataset', *theirs.cells()])} |",
        f"| {' | '.join([*file, 'ratio', f'{ours.seconds / theirs.seconds:.2f}', '', f'under 1,536: {met}'])} |",
    ]


if __name__ == "__main__":
    main()
