"""By how much each GGUF format moves the starter: logits, greedy answers, weights, and how many bits a weight takes.

    python benchmarks/exports.py [trained=ADAPTER_FOLDER ...] [--formats f16 q8_0 q6_k q5_k_m q4_k_m] [--minutes 3]

The starter alone, and with each adapter (in Hugging Face format, as `retune convert` writes it). Every file is written
and read back as the gate does it, by llama.cpp where that is installed, on one thread. Each row is stored in
results/formats.json when it is measured, and a later call measures only what is lacking there (--fresh: everything);
results/formats.md has them as a table. The gate's tolerances are about twice its figures.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio.engine.adapter_files import Adapter, read_adapter  # noqa: E402
from studio.engine.equivalence import expected_of  # noqa: E402
from studio.engine.export import CPU, speech_of  # noqa: E402
from studio.engine.folding import FoldedWeights  # noqa: E402
from studio.engine.gguf import checking, writer  # noqa: E402
from studio.engine.gguf.vocabulary import vocabulary_of  # noqa: E402
from studio.models import STARTER, require  # noqa: E402
from studio.paths import atomic_write_json, atomic_write_text  # noqa: E402
from tests.engine.test_convert import Job  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
FORMATS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
HEAD = (
    "weights", "format", "bits a weight", "logits differ by (allowed)", "same greedy answers", "near ties",
    "worst tensor differs by (allowed)", "its scale", "of the adapter's change in the file", "gate", "read with",
)  # fmt: skip
Row = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=tuple(writer.FORMATS))
    parser.add_argument("--minutes", type=float, default=60, help="end with the first file that is done after so long")
    parser.add_argument("--fresh", action="store_true", help="measure what was measured before, too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * asked.minutes
    found = {} if asked.fresh else read_rows()
    for name, folder in ({"starter": ""} | dict(each.split("=", 1) for each in asked.adapters)).items():
        lacking = [form for form in asked.formats if f"{name} {form}" not in found]
        if not lacking:
            continue
        for form, row in measured(read_adapter(Path(folder)) if folder else None, lacking):
            found[f"{name} {form}"] = [name, form, *row]
            atomic_write_json(RESULTS / "formats.json", found)
            atomic_write_text(RESULTS / "formats.md", page(list(found.values())))
            print(" | ".join(found[f"{name} {form}"]), flush=True)
            if time.monotonic() > deadline:
                sys.exit("Out of time. Call this again to go on.")
    print(page(list(found.values())))


def read_rows() -> dict[str, Row]:
    """Rows by weights and format, as they were measured so far."""
    file = RESULTS / "formats.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def measured(adapter: Adapter | None, formats: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """One a format: the file written, read back, and gone again."""
    base = require(STARTER)
    expected, weights = expected_of(base, adapter, torch.float32, CPU), FoldedWeights(base, adapter)
    speech = speech_of(vocabulary_of(expected.tokenizer, weights.config.vocab_size), expected)
    num_weights = sum(shape.numel() for shape in weights.shapes.values())
    for form in formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            writer.write(Job(path.parent), path, weights, speech, writer.FORMATS[form], {"name": "x"})
            verdict = checking.verdict_of_file(path, expected, form, 1)
            weighed = checking.weigh_file(path, weights, form)
            bits = 8 * path.stat().st_size / num_weights
        found = verdict.agreement
        share = "–" if weighed.adapter_share is None else f"{weighed.adapter_share:.1%}"
        yield form, [
            f"{bits:.2f}", f"{found.relative_error:.2g} ({found.tolerance:.2g})",
            f"{found.same_answers} of {found.num_answers}", str(found.near_ties),
            f"{weighed.error:.2g} ({weighed.allowed:.2g})", f"{weighed.scale:.4f}", share,
            "passed" if verdict.passed and weighed.passed else "FAILED", verdict.read_with,
        ]  # fmt: skip


def page(rows: Sequence[Row]) -> str:
    table = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    return "\n".join(["# How far each GGUF format moves the starter", "", *_head(), "", *table, ""])


def _head() -> Iterator[str]:
    from transformers import __version__

    memory = round(psutil.virtual_memory().total / 2**30)
    yield (
        f"`python benchmarks/exports.py NAME=ADAPTER_FOLDER`, {datetime.now(UTC):%Y-%m-%d}: {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory} GB,"
    )
    yield f"Python {platform.python_version()}, torch {torch.__version__}, transformers {__version__}; one thread."
    yield "Each file was written and read back as the gate does it."


if __name__ == "__main__":
    main()
