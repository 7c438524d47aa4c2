"""results/train.md: what was measured, as tables."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

from studio.paths import atomic_write_text, human_bytes
from training import figures
from training.figures import Row, Verdict

SHOWN_STEPS = 8
HEAD = """# Training: the studio beside TRL, LLaMA-Factory and transformers' Trainer

SmolLM2-135M-Instruct (the starter) on the CPU; LoRA of rank 16, alpha 32, no dropout, on all linear layers, where the
workload names no other method. All tools get the same tokenised rows, the same rows per optimizer step (packed
settings: as many tokens), AdamW at a constant rate and the same first weights. They are loaded side by side and take
turns, a round each of a few steps and ten seconds at least; the first step of each is warm-up.

*Effective* tokens are those of the rows that were learned, repeated rows and shared beginnings counted every time;
*real* ones are computed without padding (the studio computes what rows share once), *computed* ones with it; *trained*
ones have a loss. Speeds are medians over rounds, by the clock, preparation of batches included. Peak memory is the
resident set of the whole process since it began, loading included. *studio* says how many times the tool's effective
speed the studio reached, round by round: median (lowest to highest). A tool's best setting is what measured fastest:

- transformers best: bfloat16 weights, no checkpointing, batches of rows flattened instead of padded;
- trl best: bfloat16 weights, no checkpointing, `packing`;
- llamafactory best: `disable_gradient_checkpointing`, `neat_packing`;
- full training keeps float32 weights under bfloat16 autocast at every tool's best: bfloat16 weights lose updates;
- retune default: what a run does unless it is told otherwise.
"""


def write_page(found: dict[str, Any], path: Path) -> None:
    measured = {name: each for name, each in found["workloads"].items() if each["rounds"]}
    parts = [HEAD, _promises(measured), *(_workload(name, each) for name, each in measured.items())]
    parts += [_same_arithmetic(measured), _machine(found)]
    atomic_write_text(path, "\n".join(parts))


def _promises(measured: dict[str, Any]) -> str:
    rows = []
    for name, workload in measured.items():
        verdict = figures.verdict(workload)
        if verdict:
            rows.append(_promise(name, verdict))
    head = ["workload", "best peer", "studio, times its speed", "goal", "peak memory", "the peer's", "leanest peer's"]
    return "\n".join(["## What was promised", "", *_table(head, rows), ""])


def _promise(name: str, verdict: Verdict) -> list[str]:
    goal = "none" if verdict.target is None else f"{verdict.target:g}, {_met(bool(verdict.is_fast))}"
    memory = f"{human_bytes(verdict.ours_bytes)}, {'lower' if verdict.is_lean else 'not lower'}"
    leanest = f"{human_bytes(verdict.leanest_bytes)} ({verdict.leanest_peer})"
    return [name, verdict.best_peer, _times(verdict.times), goal, memory, human_bytes(verdict.best_bytes), leanest]


def _workload(name: str, workload: dict[str, Any]) -> str:
    lengths, trained = workload["lengths"], workload["trained"]
    about = (
        f"{workload['title']}: {workload['rows_per_step']} rows a step, {mean(lengths):.0f} tokens a row (median "
        f"{median(lengths):.0f}, longest {max(lengths)}), {sum(trained) / sum(lengths):.0%} of them trained."
    )
    head = ["setting", "effective", "per CPU second", "real", "trained", "computed", "peak memory", "s to loss"]
    rows = [_setting(row) for row in figures.rows(workload)]
    lines = [f"## {name}", "", about[0].upper() + about[1:], "", *_table([*head, "studio", "rounds"], rows), ""]
    target = figures.target_loss(workload)
    if target is not None:
        lines += [f"Loss to reach: {target:.3f}, the base line's mean over its last {figures.SMOOTH} steps.", ""]
    failed = [f"{setting} failed: {reason}" for setting, reason in workload["failures"].items()]
    if failed:
        lines += [*failed, ""]
    if not workload["complete"]:
        lines += ["This workload was interrupted; fewer rounds count.", ""]
    return "\n".join([*lines, *_losses(workload)])


def _setting(row: Row) -> list[str]:
    speeds = [f"{speed:,.0f}" for speed in (row.real, row.trained, row.computed)]
    reached = f"> {row.num_steps} steps" if row.target_seconds is None else f"{row.target_seconds:.0f}"
    times = _times(row.ours_times) if row.ours_times else ""
    first = [row.name, f"{row.effective:,.0f}", f"{row.per_cpu_second:,.0f}", *speeds]
    return [*first, human_bytes(row.peak_bytes), reached, times, str(row.num_rounds)]


def _losses(workload: dict[str, Any]) -> list[str]:
    """The curves as far as the base line's, thinned to a few steps."""
    names = list(dict.fromkeys(each["setting"] for each in workload["rounds"]))
    num_steps = len(figures.losses(workload, figures.BASE_LINE)) or len(figures.losses(workload, figures.OURS))
    stride = max(1, -(-num_steps // SHOWN_STEPS))
    steps = sorted({*range(0, num_steps, stride), num_steps - 1})
    pairs = [(name, figures.losses(workload, name)) for name in names]
    rows = [[name, *(f"{curve[step]:.3f}" if step < len(curve) else "" for step in steps)] for name, curve in pairs]
    return [*_table(["loss at step", *(str(step + 1) for step in steps)], rows), ""]


def _same_arithmetic(measured: dict[str, Any]) -> str:
    """The gate and the losses: that less time is not less work."""
    head = ["workload", "gradient, float32", "gradient, bfloat16", "plain bfloat16"]
    pairs = [(figures.OURS, other) for other in figures.SAME_ORDER] + [figures.SAME_ORDER]
    head += [f"loss: {one.split()[0]} and {other}" for one, other in pairs]
    rows = []
    for name, workload in measured.items():
        errors, allowed = workload.get("gradient"), workload.get("gradient_tolerance", {})
        cells = ["not measured"] * 3
        if errors:
            cells = [f"{errors[kind]:.1e} (≤ {allowed[kind]:.1e})" for kind in ("float32", "bfloat16")]
            cells.append(f"{errors['padded bfloat16']:.1e}")
        rows.append([name, *cells, *(_difference(workload, *pair) for pair in pairs)])
    text = (
        "Gradient: relative error of the studio's first step beside rows padded, whole logits, eager attention and\n"
        "float32; *plain bfloat16* is what that way itself loses in bfloat16. Loss: largest difference of a loss\n"
        "between settings that train the same rows in the same order, over the steps of both; how far two other tools\n"
        "differ tells what bfloat16 alone makes of it."
    )
    return "\n".join(["## The same arithmetic", "", text, "", *_table(head, rows), ""])


def _difference(workload: dict[str, Any], one: str, other: str) -> str:
    found = figures.largest_difference(workload, one, other)
    return f"{found[0]:.4f} in {found[1]} steps" if found else "not measured"


def _machine(found: dict[str, Any]) -> str:
    machine = found.get("machine", {})
    loads = [load for each in found["workloads"].values() for one in each["rounds"] for load in one["load"]]
    busy = sum(load > machine["cores"] + 0.5 for load in loads) if machine else 0
    versions = [
        f"{tool} ({found['threads'][tool]} threads): " + ", ".join(f"{name} {each}" for name, each in packages.items())
        for tool, packages in found.get("versions", {}).items()
    ]
    lines = ["## Machine", ""]
    if machine:
        lines += [
            f"{machine['cpu']} ({', '.join(machine['flags'])}), {machine['cores']} cores, "
            f"{human_bytes(machine['memory'])} memory, Python {machine['python']}, OMP_NUM_THREADS "
            f"{machine['OMP_NUM_THREADS']}. Load before and after rounds: median {median(loads):.1f}, highest "
            f"{max(loads):.1f}; {busy} of {len(loads)} above the number of cores, where other work disturbed.",
            "",
        ]
    lines += [*(f"- {line}" for line in versions), "", f"Measured {found.get('measured', '')}."]
    return "\n".join([*lines, "Command: `python benchmarks/peers.py && python benchmarks/train.py`.", ""])


def _times(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _met(good: bool) -> str:
    return "met" if good else "missed"


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
