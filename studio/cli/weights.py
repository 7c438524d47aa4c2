"""`retune convert`: checkpoints become Hugging Face folders, adapters are merged into their base, models are split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.group import group
from studio.cli.lazy import catalog, conversions, jobs
from studio.cli.options import ProjectOption, ShardOption, base_model, chosen
from studio.errors import CheckpointError
from studio.paths import system_folder
from studio.weight_folders import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from studio.store.jobs import Job

DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, float16 or bfloat16; left out, what fits the checkpoint or base.")
]
CONFIG_SUFFIXES = (".py", ".yaml", ".yml")
app = group("Convert checkpoints and merge adapters.")


@app.command("pth_to_hf")
def pth_to_hf(
    config_or_run: Annotated[
        str, typer.Argument(help="The run, its config (file or built-in name), or the .py of an XTuner run.")
    ],
    pth: Annotated[
        Path, typer.Argument(help="The checkpoint: its name in the run (step_60.pth), a .pth, or a DeepSpeed folder.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    fp32: Annotated[bool, typer.Option("--fp32", help="Write weights in float32.")] = False,
    dtype: DtypeOption = "",
    base: Annotated[str, typer.Option(help="The base model, where the one in an XTuner config is not here.")] = "",
    max_shard_size: ShardOption = DEFAULT_SHARD_SIZE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one that lies there.")] = False,
    project: ProjectOption = "",
) -> None:
    """Turn a checkpoint into a Hugging Face folder: an adapter in PEFT's format, or a full model.

    Checkpoints of XTuner (iter_N.pth, file or folder) become float16 as they do there, unless --fp32 or --dtype say
    otherwise; their .py config is read and never run.

    Example: retune convert pth_to_hf starter_lora-1 step_60.pth luna-adapter
    """
    is_file = Path(config_or_run).is_file() or Path(config_or_run).suffix in CONFIG_SUFFIXES
    folder = system_folder() if is_file or catalog.is_built_in(config_or_run) else chosen(project).folder
    config = str(Path(config_or_run).resolve()) if is_file else config_or_run
    args = {"config": config, "pth": str(_checkpoint(pth, folder, config_or_run)), "out": str(out.resolve())}
    args |= {"dtype": "float32" if fp32 else dtype, "max_shard_size": max_shard_size, "overwrite": overwrite}
    args |= {"base": base_model(base)} if base else {}
    _do(folder, "convert", args, f"convert {pth.name}")
    show.say(f"Wrote {out.resolve()}")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: starter, a folder, or an id.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    max_shard_size: ShardOption = DEFAULT_SHARD_SIZE,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: DtypeOption = "",
    onto: Annotated[
        str, typer.Option(help="base, or for QLoRA dequantised: the 4-bit base it was trained on, unpacked.")
    ] = "base",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merged model that lies there.")] = False,
) -> None:
    """Fold an adapter into its base, and check that the result answers the same.

    The result has the base's number format; with --dtype float16 it has the bits that XTuner's merge gives.

    Example: retune convert merge starter luna-adapter luna-merged
    """
    args = {"base": base_model(base), "adapter": str(adapter.resolve()), "out": str(out.resolve())}
    args |= {"max_shard_size": max_shard_size, "device": device, "dtype": dtype}
    args |= {"onto": onto, "overwrite": overwrite}
    ended = _do(system_folder(), "merge", args, f"merge {adapter.name}", needs_device=True)
    show.say(f"Wrote {out.resolve()}")
    say_verdict(ended)


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.")],
) -> None:
    """Write a model with one file a tensor, as XTuner's split does; every bit stays.

    Example: retune convert split luna-merged luna-split
    """
    args = {"source": str(source.resolve()), "out": str(out.resolve())}
    ended = _do(system_folder(), "split", args, f"split {source.name}")
    show.say(f"Wrote {ended.result['tensors']} files of weights into {out.resolve()}")


@app.command()
def layout(
    source: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.")],
    own: Annotated[
        Path | None,
        typer.Option("--own", help="Write the family's own layout, which this folder has."),
    ] = None,
) -> None:
    """Write InternLM2, InternLM, Baichuan 7B or Qwen as transformers' own class, or back in the family's layout.

    Such models are trained and served as they are; this is for tools that know one of the two layouts only.

    Example: retune convert layout internlm2_5-1_8b-chat internlm2_5-as-llama
    """
    args = {"source": str(source.resolve()), "out": str(out.resolve()), "own": str(own.resolve()) if own else ""}
    _do(system_folder(), "layout", args, f"layout of {source.name}")
    show.say(f"Wrote {out.resolve()}")


def say_verdict(merge: Job) -> None:
    """Whether the merged model answers as base and adapter do; loudly when it does not."""
    warning = "" if merge.result["verified"] else "Warning: "
    show.say(f"{warning}{merge.result['message']}")


def _do(folder: Path, kind: str, args: dict[str, object], title: str, needs_device: bool = False) -> Job:
    """What cannot become anything is refused before a job starts, and loads torch, for it."""
    conversions.check(kind, folder, args)
    return follow(folder, jobs.start(folder, kind, args, title=title, needs_device=needs_device))


def _checkpoint(pth: Path, folder: Path, run: str) -> Path:
    """The checkpoint as given, else by its name among the run's files."""
    among_run = folder / "runs" / run / pth.name
    found = next((path for path in (pth, among_run) if path.exists()), None)
    if found is None:
        raise CheckpointError(f"There is no checkpoint {str(pth)!r}.", "`retune checkpoints list` shows what there is.")
    return found.resolve()
