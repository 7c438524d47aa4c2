"""`retune convert` and `retune evaluate`: checkpoints become Hugging Face folders, merged models, and scorecards."""

from pathlib import Path
from typing import Annotated

import typer

from studio import jobs, runs
from studio.cli import show
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.paths import system_folder
from studio.store import checkpoints, evaluations, open_db

app = typer.Typer(help="Convert checkpoints and merge adapters.", no_args_is_help=True)
ShardOption = Annotated[str, typer.Option(help="Largest file, as 2GB or 500MB.")]


@app.command("pth_to_hf")
@app.command("pth-to-hf", hidden=True)
def pth_to_hf(
    config_or_run: Annotated[str, typer.Argument(help="The run, or its config file.")],
    pth: Annotated[Path, typer.Argument(help="The checkpoint, step_N.pth.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    fp32: Annotated[bool, typer.Option(help="Keep weights in float32.")] = False,
    max_shard_size: ShardOption = "2GB",
    project: ProjectOption = "",
) -> None:
    """Turn a checkpoint into a Hugging Face folder: an adapter in PEFT's format, or a full model."""
    is_file = Path(config_or_run).is_file()
    folder = system_folder() if is_file else chosen(project).folder
    config = str(Path(config_or_run).resolve()) if is_file else config_or_run
    args = {"config": config, "pth": str(_checkpoint(pth, folder, config_or_run)), "out": str(out.resolve())}
    _do(folder, "convert", {**args, "fp32": fp32, "max_shard_size": max_shard_size}, f"convert {pth.name}")
    show.say(f"Wrote {out}")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: starter, a folder, or an id.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    max_shard_size: ShardOption = "2GB",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fold an adapter into its base, and check that the result answers the same."""
    args = {"base": base, "adapter": str(adapter.resolve()), "out": str(out.resolve())}
    args |= {"max_shard_size": max_shard_size, "device": device}
    _do(system_folder(), "merge", args, f"merge {adapter.name}", needs_device=True)
    show.say(f"Wrote {out}")


def evaluate(
    run: Annotated[str, typer.Argument(help="The run whose checkpoint is scored.")],
    step: Annotated[int, typer.Option(min=0, help="Its step; the newest checkpoint when left out.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many probes of a kind; 0 asks all.")] = 0,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Score a checkpoint beside its base on held-out probes: identity, leakage, retention."""
    workspace = chosen(project)
    if not step:
        with open_db(workspace.folder) as db:
            step = max((c.step for c in checkpoints.listed(db, run)), default=0)
    if not runs.is_converted(workspace, run, step):
        show.follow(workspace.folder, runs.start_convert(workspace, run, step))
    job = show.follow(workspace.folder, runs.start_evaluate(workspace, run, step, limit))
    with open_db(workspace.folder) as db:
        done = [evaluations.get(db, id) for id in job.result["evaluations"]]
    if json:
        return show.as_json(done)
    for evaluation in done:
        scorecard(evaluation)
    return None


def scorecard(evaluation: evaluations.Evaluation) -> None:
    """Print one evaluation: base beside tuned, with intervals."""
    from studio.report import score_rows

    show.say(f"\n{evaluation.subject} beside its base ({evaluation.base}), weights {evaluation.weights_hash[:12]}")
    show.table(["", "base", "tuned"], score_rows(evaluation))


def _do(folder: Path, kind: str, args: dict[str, object], title: str, needs_device: bool = False) -> None:
    show.follow(folder, jobs.start(folder, kind, args, title=title, needs_device=needs_device))


def _checkpoint(pth: Path, folder: Path, run: str) -> Path:
    """The checkpoint as given, else by its name among the run's files."""
    among_run = folder / "runs" / run / pth.name
    return pth.resolve() if pth.exists() or not among_run.exists() else among_run
