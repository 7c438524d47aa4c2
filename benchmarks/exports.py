"""By how much each GGUF format moves the starter: logits, greedy answers, weights, and how many bits a weight takes.

    python benchmarks/exports.py [luna=ADAPTER_FOLDER ...] [--formats f16 q8_0 q6_k q5_k_m q4_k_m]

The starter alone, and with each adapter (in Hugging Face format, as `retune convert` writes it). Every file is written
and read back as the gate does it, by llama.cpp where that is installed, on one thread. Prints a table, as
results/exports.md has it; the gate's tolerances are about twice its figures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
from tests.engine.test_convert import Job  # noqa: E402

HEAD = ("weights", "format", "bits", "logits differ by", "same", "near ties", "tensors by", "scale", "adapter's share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--formats", nargs="+", default=["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    named = {"starter": None} | dict(each.split("=", 1) for each in asked.adapters)
    for name, folder in named.items():
        for row in rows(read_adapter(Path(folder)) if folder else None, asked.formats):
            print(f"| {name} | {' | '.join(row)} |", flush=True)


def rows(adapter: Adapter | None, formats: list[str]) -> Iterator[list[str]]:
    """One a format: the file written, read back, and gone again."""
    base = require(STARTER)
    expected, weights = expected_of(base, adapter, torch.float32, CPU), FoldedWeights(base, adapter)
    speech = speech_of(vocabulary_of(expected.tokenizer, weights.config.vocab_size), expected)
    num_weights = sum(shape.numel() for shape in weights.shapes.values())
    for form in formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            writer.write(Job(path.parent), path, weights, speech, writer.FORMATS[form], {"name": "x"})
            found = checking.verdict_of_file(path, expected, form, 1).agreement
            weighed = checking.weigh_file(path, weights, form)
            share = "–" if weighed.adapter_share is None else f"{weighed.adapter_share:.1%}"
            bits = 8 * path.stat().st_size / num_weights
        yield [
            form, f"{bits:.2f}", f"{found.relative_error:.2g}", f"{found.same_answers} of {found.num_answers}",
            str(found.near_ties), f"{weighed.error:.2g}", f"{weighed.scale:.4f}", share,
        ]  # fmt: skip


if __name__ == "__main__":
    main()
