"""Do two processes compute what one does? Every strategy on the same global batch, and what a resume changes.

    python -m benchmarks.ranks [MODEL_FOLDER]      writes benchmarks/results/ranks.md

Twenty steps of eight rows; loss, gradient norm and weights of two processes (gloo) beside one, as relative differences.
Without a folder a two-layer Llama is made.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from studio.paths import REPOSITORY
from tests.engine import rank_worker
from tests.engine.folders import make_base
from tests.engine.test_distributed import distance

STRATEGIES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
KINDS = ("lora-tree-float32", "full-sequence-float32", "qlora-tree-float32", "lora-tree-bfloat16", "full-tree-bfloat16")
RESULT = REPOSITORY / "benchmarks" / "results" / "ranks.md"


def main(folder: str = "") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(folder) if folder else make_base(Path(scratch, "tiny"))
        cases = [f"{strategy}-{kind}" for kind in KINDS for strategy in STRATEGIES]
        out = Path(scratch, "found.pt")
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        worker = [*line, "tests.engine.rank_worker", str(model), str(out), *cases]
        subprocess.run(worker, cwd=REPOSITORY, env=environment, check=True, stderr=subprocess.DEVNULL)
        found = torch.load(out, weights_only=True)
        alone = {kind: rank_worker.train(model, f"none-{kind}", 1) for kind in KINDS}
    rows = [_row(case, found[case], alone[case.partition("-")[2]]) for case in cases]
    RESULT.write_text(_page(rows, folder or "a two-layer Llama, 32 wide, random weights"), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


def _row(case: str, found: dict, alone: dict) -> str:
    loss, norm = (_apart(found[name], alone[name]) for name in ("losses", "norms"))
    weights = distance(found["weights"], alone["weights"])
    resumed = "bit-equal" if _goes_on(found) else "differs"
    return f"| {case} | {loss:.1e} | {norm:.1e} | {weights:.1e} | {resumed if 'resumed' in found else '—'} |"


def _apart(values: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(values, expected, strict=True))


def _goes_on(found: dict) -> bool:
    later = found.get("resumed", {"losses": [], "weights": {}})
    same = found["losses"][len(found["losses"]) - len(later["losses"]) :] == later["losses"]
    return same and all(torch.equal(tensor, found["weights"][name]) for name, tensor in later["weights"].items())


def _page(rows: list[str], model: str) -> str:
    versions = f"gloo, CPU, torch {torch.__version__.split('+')[0]}"
    head = [
        "# Two processes beside one",
        "",
        f"`python -m benchmarks.ranks`: {rank_worker.NUM_STEPS} steps of {rank_worker.ROWS} rows on {model}; two",
        f"processes on one machine ({versions}). Largest relative difference of a step's loss and gradient norm to one",
        "process, and of all learned weights together at the end. Resumed: saved after half of the steps and gone on",
        "with by models made anew, compared with not having stopped (float32; DDP's file is one process's, and its",
        "resume is in tests/engine/test_ranks.py).",
        "",
        "A whole model in bfloat16 has bfloat16 weights with float32 masters under ZeRO, and float32 weights under",
        "autocast in one process and DDP: another arithmetic, and the differences are those of bfloat16.",
        "GPUs and several machines: not measured.",
        "",
        "| case | loss | gradient norm | weights | resumed |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows, ""])


if __name__ == "__main__":
    main(*sys.argv[1:])
