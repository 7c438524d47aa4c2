"""Milliseconds of attention, forward and backward, by kind and length of segments, in float32 and bfloat16.

    python benchmarks/attention.py [--repeats 7] [--tokens 2048]

A row of tokens with the starter's heads (9, and 3 for keys and values, 64 wide) that holds segments of one length,
each blind to the others; and the same with a beginning of 64 tokens that all share. Kinds: the studio's blocks of plain
matrix products, PyTorch's SDPA with a mask over the whole row, and the plain way with the whole score matrix. They take
turns in every repeat. What each computes is compared with SDPA in float32. Writes benchmarks/results/attention.md.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio.engine import devices  # noqa: E402
from studio.engine.attention import Layout, make_layout  # noqa: E402
from studio.paths import atomic_write_text  # noqa: E402

RESULT = Path(__file__).parent / "results" / "attention.md"
HEADS, GROUPS, WIDTH = 9, 3, 64
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SHARED = 64
CPU = torch.device("cpu")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    devices.set_threads()
    lines = [
        "# Attention on the CPU",
        "",
        f"Milliseconds for {options.tokens:,} tokens, {HEADS} heads, {GROUPS} for keys and values, {WIDTH} wide,",
        f"forward and backward; medians of {options.repeats} repeats in turns. *blocks* is the studio's, *masked* is",
        "PyTorch's SDPA with a mask over the row, *plain* has the whole score matrix. *error*: largest relative",
        "distance of the blocks' output and gradients to SDPA in float32.",
        "",
    ]
    for shared in (0, SHARED):
        title = f"a shared beginning of {shared} tokens" if shared else "nothing shared"
        lines += [f"## Segments with {title}", ""]
        lines += _table(shared, options.tokens, options.repeats)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines += [f"Machine: {machine}, load at the end {os.getloadavg()[0]:.1f}."]
    lines += ["Command: `python benchmarks/attention.py`."]
    atomic_write_text(RESULT, "\n".join(lines) + "\n")


def _table(shared: int, num_tokens: int, repeats: int) -> list[str]:
    head = ["segment", "format", "blocks", "masked", "plain", "blocks, times as fast as masked", "error"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for length in (each for each in LENGTHS if each <= num_tokens):
        for dtype in (torch.float32, torch.bfloat16):
            ends = ends_of(shared, length, num_tokens)
            times, error = measure(ends, dtype, repeats)
            cells = [str(length), str(dtype).removeprefix("torch."), *(f"{times[kind]:.1f}" for kind in times)]
            cells += [f"{times['masked'] / times['blocks']:.1f}", f"{error:.1e}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def ends_of(shared: int, length: int, num_tokens: int) -> np.ndarray:
    """For each token the first after it that does not see it: `shared` tokens seen by all, then segments."""
    places = np.arange(num_tokens - shared)
    ends = np.minimum((places // length + 1) * length + shared, num_tokens)
    return np.concatenate([np.full(shared, num_tokens), ends]).astype(np.int64)


def measure(ends: np.ndarray, dtype: torch.dtype, repeats: int) -> tuple[dict[str, float], float]:
    """Milliseconds by kind, and the error of the blocks."""
    mask = mask_of(ends)
    kinds = {"blocks": _by(make_layout("blocks", ends, CPU)), "masked": _masked(mask), "plain": _plain(mask)}
    row = inputs(len(ends), dtype)
    for attend in kinds.values():
        run(attend, row)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, attend in kinds.items():
            began = time.perf_counter()
            run(attend, row)
            times[kind].append(1000 * (time.perf_counter() - began))
    exact = run(_masked(mask), [each.float() for each in row])
    error = max(_distance(one, other) for one, other in zip(run(kinds["blocks"], row), exact, strict=True))
    return {kind: median(each) for kind, each in times.items()}, error


def mask_of(ends: np.ndarray) -> Tensor:
    """(tokens, tokens), true where a token (first axis) sees another."""
    places, last = torch.arange(len(ends)), torch.from_numpy(ends)
    return (places[:, None] >= places[None, :]) & (places[:, None] < last[None, :])


def inputs(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Query (heads, tokens, width), key and value (groups, tokens, width), and the gradient of the output."""
    chance = torch.Generator().manual_seed(0)
    shapes = [(HEADS, num_tokens, WIDTH), *[(GROUPS, num_tokens, WIDTH)] * 2, (num_tokens, HEADS, WIDTH)]
    return [torch.randn(shape, generator=chance).to(dtype) for shape in shapes]


def run(attend: Attend, row: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [each.detach().requires_grad_() for each in row[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, row[3])]


def _by(layout: Layout) -> Attend:
    return lambda query, key, value: layout.attend(query, key, value, WIDTH**-0.5)


def _masked(mask: Tensor) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        row = (query[None], key[None], value[None])
        out = functional.scaled_dot_product_attention(*row, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def _plain(mask: Tensor) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (each.repeat_interleave(HEADS // GROUPS, 0) for each in (key, value))
        scores = (query @ keys.transpose(1, 2) * WIDTH**-0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values).transpose(0, 1)

    return attend


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other).norm() / other.norm())


if __name__ == "__main__":
    main()
