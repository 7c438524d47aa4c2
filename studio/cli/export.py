"""`retune export`: files for another tool, read back and held against what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import show
from studio.cli.follow import follow
from studio.cli.group import group
from studio.cli.lazy import exports
from studio.cli.options import JsonOption, ProjectOption, ShardOption, StepOption, base_model, checkpoint_step, chosen
from studio.errors import StudioError
from studio.paths import system_folder, typed_path
from studio.weight_folders import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    from studio.exports import Choice
    from studio.store.checkpoints import Output
    from studio.store.jobs import Job

app = group("Export a checkpoint for another tool, and check that it answers the same.")
SourceArgument = Annotated[str, typer.Argument(help="A run, as starter_lora-1, or a folder: an adapter or a model.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="The folder to write; in the project when left out.")]
BaseOption = Annotated[str, typer.Option(help="Base model of an adapter folder, where the one it names is not here.")]
FormatOption = Annotated[
    str,
    typer.Option(help="f16, bf16, q8_0 or f32; with llama.cpp (the extra gguf) q6_k, q5_k_m or q4_k_m too."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an export that lies there.")]


@app.command()
def gguf(
    source: SourceArgument,
    format: FormatOption = "f16",
    step: StepOption = 0,
    out: OutOption = None,
    base: BaseOption = "",
    overwrite: OverwriteOption = False,
    project: ProjectOption = "",
) -> None:
    """Write a GGUF file for llama.cpp and LM Studio; exit code 1 when it does not answer the same.

    Example: retune export gguf starter_lora-1 --format q8_0
    """
    _do(source, step, out, base, exports.Choice("gguf", format, overwrite), project)


@app.command()
def ollama(
    source: SourceArgument,
    format: FormatOption = "f16",
    step: StepOption = 0,
    out: OutOption = None,
    base: BaseOption = "",
    overwrite: OverwriteOption = False,
    create: Annotated[bool, typer.Option("--create", help="Then let the Ollama of this machine create it.")] = False,
    project: ProjectOption = "",
) -> None:
    """Write a GGUF file and a Modelfile for Ollama; exit code 1 when it does not answer the same.

    Example: retune export ollama starter_lora-1 --format q8_0 --create
    """
    if create and not exports.has_ollama():
        raise StudioError("Ollama is not on the PATH, so --create can do nothing.", "https://ollama.com/download")
    ended = _do(source, step, out, base, exports.Choice("ollama", format, overwrite), project)
    if create:
        place = system_folder()
        made = follow(place, exports.start_ollama(place, Path(ended.result["path"])))
        show.say(f"Created in Ollama: {made.result['command']}")


@app.command()
def adapter(
    source: SourceArgument,
    step: StepOption = 0,
    out: OutOption = None,
    base: BaseOption = "",
    overwrite: OverwriteOption = False,
    project: ProjectOption = "",
) -> None:
    """Bundle an adapter for PEFT, with template, card and a zip to share; exit code 1 when it answers otherwise.

    Example: retune export adapter starter_lora-1
    """
    _do(source, step, out, base, exports.Choice("adapter", overwrite=overwrite), project)


@app.command()
def merged(
    source: SourceArgument,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; the base's own when left out.")] = "",
    onto: Annotated[
        str, typer.Option(help="base, or for QLoRA dequantised: the 4-bit base it was trained on, unpacked.")
    ] = "base",
    max_shard_size: ShardOption = DEFAULT_SHARD_SIZE,
    step: StepOption = 0,
    out: OutOption = None,
    base: BaseOption = "",
    overwrite: OverwriteOption = False,
    project: ProjectOption = "",
) -> None:
    """Fold an adapter into its base, for vLLM, LMDeploy and transformers; exit code 1 when it answers otherwise.

    Example: retune export merged starter_lora-1 --dtype float16
    """
    _do(source, step, out, base, exports.Choice("merged", dtype, overwrite, onto, max_shard_size), project)


@app.command()
def push(
    export: Annotated[str, typer.Argument(help="An export: its name in the project, or its folder.")],
    repo: Annotated[str, typer.Argument(help="Where to, as owner/name.")],
    hub: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; private when left out.")] = False,
    despite_gate: Annotated[bool, typer.Option("--despite-gate", help="Push one that failed its gate.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    project: ProjectOption = "",
) -> None:
    """Push an export to Hugging Face or ModelScope, into a private repository unless --public says otherwise.

    The token comes from HF_TOKEN or MODELSCOPE_API_TOKEN, or from an earlier login; it is not stored.

    Example: retune export push starter_lora-1-step_60-adapter me/luna
    """
    place = typed_path(export)
    is_folder = place.is_dir()
    workspace = None if is_folder else chosen(project)
    folder = place.resolve() if workspace is None else exports.find(workspace, export)
    if not yes:
        who = "everybody" if public else "you alone"
        typer.confirm(f"Upload {folder.name} to {hub}, {repo}, for {who} to see?", abort=True)
    home = system_folder() if workspace is None else workspace.folder
    ended = follow(home, exports.start_push(home, folder, hub, repo, public, despite_gate))
    show.say(f"Pushed to {ended.result['url']}")


@app.command()
def smoke(
    export: Annotated[str, typer.Argument(help="A whole model: its name in the project, or its folder.")],
    tool: Annotated[str, typer.Option("--with", help="vllm, lmdeploy or transformers; it must be installed.")],
    project: ProjectOption = "",
) -> None:
    """Start another tool's server on a merged model, ask it the probes, and compare; exit code 1 when it differs.

    Example: retune export smoke luna-merged --with vllm
    """
    place = typed_path(export)
    folder = place.resolve() if place.is_dir() else exports.find(chosen(project), export)
    home = system_folder()
    found = follow(home, exports.start_smoke(home, folder, tool)).result
    answers = f"{found['same']} of {found['all']} greedy answers are the same"
    show.say(f"{found['question']}\nHere: {found['expected']}\n{tool}: {found['found']}")
    if not found["passed"]:
        show.fail(f"{tool} answers otherwise: {answers}.")
        raise typer.Exit(1)
    show.say(f"Passed: {answers}.")


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List what was exported, newest first, each with its verdict.

    Example: retune export list
    """
    workspace = chosen(project)
    found = exports.listed(workspace)
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No exports yet: retune export gguf RUN")
    rows = [(exports.kind_of(each), each.run_id, each.step, _state(each), workspace.path(each.path)) for each in found]
    return show.table(["for", "run", "step", "gate", "folder"], rows)


def _do(source: str, step: int, out: Path | None, base: str, choice: Choice, project: str) -> Job:
    """Export, say what came of it, and leave with 1 when the gate failed."""
    folder = typed_path(source)
    job = _of_folder(folder, out, base, choice) if folder.is_dir() else _of_run(source, step, out, choice, project)
    say_verdict(job, choice.kind)
    return job


def _of_folder(folder: Path, out: Path | None, base: str, choice: Choice) -> Job:
    target = out or folder.with_name(f"{folder.name}-{choice.kind}")
    place = system_folder()
    job = exports.start_of_folder(place, folder.resolve(), base_model(base) if base else "", target.resolve(), choice)
    return follow(place, job)


def _of_run(source: str, step: int, out: Path | None, choice: Choice, project: str) -> Job:
    workspace = chosen(project)
    step = checkpoint_step(workspace, source, step)
    job = exports.start(workspace, source, step, choice, out=out.resolve() if out else None)
    return follow(workspace.folder, job)


def say_verdict(ended: Job, kind: str) -> None:
    """Where the export lies, what the gate says, and how it is used; leaves with exit code 1 when it failed."""
    result = ended.result
    show.say(f"Wrote {result['path']}")
    if not result["passed"]:
        show.fail(result["message"])
        raise typer.Exit(1)
    show.say(result["message"])
    for use in exports.uses(kind, Path(result["path"]), result.get("base", ""), result.get("file", "")):
        show.say(f"{use.tool}{'' if use.is_installed else ' (not installed here)'}:\n{use.command}")


def _state(output: Output) -> str:
    return "passed" if exports.passed(output) else "FAILED"
