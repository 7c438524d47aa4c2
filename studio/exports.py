"""Files for other tools, made from a checkpoint: what there is to choose, starting one, and what was exported."""

import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio import jobs, runs
from studio.errors import JobError, StudioError
from studio.machine import INSTALL_QUANTIZE, LLAMA_CPP_PACKAGES, QUANTIZE_TOOL
from studio.other_servers import Use, server_lines, use
from studio.paths import slugify
from studio.projects import Project
from studio.store import checkpoints as store
from studio.store import open_db
from studio.store.checkpoints import Output
from studio.store.jobs import Job
from studio.weight_folders import DEFAULT_SHARD_SIZE

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
"""Formats that llama.cpp itself rounds to; offered where a package of it is installed, or its tool is on the PATH."""
GGUF_FORMATS = ("f16", "bf16", "q8_0", "f32", *K_QUANTS)
FORMATS = {
    "ollama": GGUF_FORMATS,
    "gguf": GGUF_FORMATS,
    "merged": ("", "float16", "bfloat16", "float32"),
    "adapter": (),
}
"""What an export is for -> the number formats there are for it; "" is the base's own."""
METHODS = {
    "ollama": ("lora", "qlora", "full"),
    "gguf": ("lora", "qlora", "full"),
    "merged": ("lora", "qlora"),
    "adapter": ("lora", "qlora"),
}
"""What an export is for -> the methods whose checkpoints can become one."""


@dataclass(frozen=True)
class Choice:
    """What an export is made with. `kind` and `format` as in FORMATS; `onto`: base, or for QLoRA dequantised."""

    kind: str
    format: str = ""
    overwrite: bool = False
    onto: str = "base"
    max_shard_size: str = DEFAULT_SHARD_SIZE

    def args(self) -> dict[str, Any]:
        """As the job takes them. Raises StudioError for a kind or a format that there is not."""
        if self.kind not in FORMATS:
            raise StudioError(f"There is no export for {self.kind!r}.", f"Allowed: {', '.join(FORMATS)}.")
        allowed = FORMATS[self.kind]
        if self.format and self.format not in allowed:
            raise StudioError(
                f"An export for {self.kind} cannot be written as {self.format!r}.",
                f"Allowed: {', '.join(filter(None, allowed))}.",
            )
        if self.format in K_QUANTS and not can_quantize():
            raise StudioError(f"{self.format} is rounded by llama.cpp, which is not installed.", INSTALL_QUANTIZE)
        fields = ("kind", "format", "overwrite", "onto", "max_shard_size")
        return {name: getattr(self, name) for name in fields}

    def replacing(self, overwrite: bool) -> "Choice":
        return replace(self, overwrite=overwrite)


def can_quantize() -> bool:
    return shutil.which(QUANTIZE_TOOL) is not None or any(map(find_spec, LLAMA_CPP_PACKAGES))


def has_ollama() -> bool:
    return shutil.which("ollama") is not None


def formats_here(kind: str) -> tuple[str, ...]:
    """The number formats that can be written on this machine, as in FORMATS."""
    return tuple(each for each in FORMATS[kind] if each not in K_QUANTS or can_quantize())


HUBS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def folder_of(project: Project, name: str, choice: Choice) -> Path:
    """Where an export of that name lies. Raises JobError for a name that is none of a folder."""
    if slugify(name).replace("-", "_") != name.replace("-", "_"):
        raise JobError(f"{name!r} cannot name a folder.", f"For example {slugify(name)!r}.")
    return project.path("merged" if choice.kind == "merged" else "exports", name)


def default_name(run_id: str, step: int, choice: Choice) -> str:
    """A name that tells number formats apart."""
    return "-".join(filter(None, [f"{run_id}-step_{step}", choice.kind, choice.format]))


def start(project: Project, run_id: str, step: int, choice: Choice, name: str = "", out: Path | None = None) -> Job:
    """Export a checkpoint of a run, in a job: into the project under `name`, or into the folder `out`."""
    run = runs.get_run(project, run_id)
    out = out or folder_of(project, name or default_name(run.id, step, choice), choice)
    args = {"run_id": run.id, "step": step, "out": str(out)} | choice.args()
    return jobs.start(project.folder, "export", args, title=f"export {run.id} step {step}", run_id=run.id)


def start_of_folder(folder: Path, weights: Path, base: str, out: Path, choice: Choice) -> Job:
    """Export an adapter or a model that lies in a folder, in a job of `folder`."""
    args = {"weights": str(weights), "base": base, "out": str(out)} | choice.args()
    return jobs.start(folder, "export", args, title=f"export {weights.name}")


def start_push(
    folder: Path, export: Path, hub: str, repo: str, public: bool = False, despite_gate: bool = False
) -> Job:
    """Push an export to a hub, in a job of `folder`. Raises StudioError for a hub or a name that there cannot be."""
    if hub not in HUBS:
        raise StudioError(f"There is no hub named {hub!r}.", f"Allowed: {', '.join(HUBS)}.")
    if not REPOSITORY.fullmatch(repo):
        raise StudioError(f"{repo!r} does not name a repository.", "It looks like owner/name.")
    args = {"export": str(export), "hub": hub, "repo": repo, "public": public, "despite_gate": despite_gate}
    return jobs.start(folder, "push", args, title=f"push {export.name}", needs_device=False)


def start_ollama(folder: Path, export: Path) -> Job:
    """Let this machine's Ollama create a model of an export, under the name of its folder, in a job of `folder`."""
    args = {"export": str(export), "name": slugify(export.name)}
    return jobs.start(folder, "ollama", args, title=f"ollama create {args['name']}", needs_device=False)


def start_smoke(folder: Path, export: Path, tool: str) -> Job:
    """Ask another tool's server (vllm, lmdeploy, transformers) what a whole model answers, in a job of `folder`."""
    return jobs.start(folder, "smoke", {"export": str(export), "tool": tool}, title=f"smoke {tool}")


def is_busy(project: Project, run_id: str, step: int) -> bool:
    """Whether this checkpoint is being exported."""
    found = (job for job in jobs.refresh(project.folder) if job.kind in ("export", "merge") and job.live)
    return any((job.args.get("run_id"), job.args.get("step")) == (run_id, step) for job in found)


def listed(project: Project, run_id: str = "", step: int = 0) -> Sequence[Output]:
    """What was exported (from one checkpoint, where it is named), newest first."""
    with open_db(project.folder) as db:
        found = [each for each in store.outputs(db) if each.kind in ("export", "merged")]
    return [each for each in found if not run_id or (each.run_id, each.step) == (run_id, step)]


def find(project: Project, name: str) -> Path:
    """The folder of an export by its name. Raises StudioError, naming those there are."""
    found = {Path(each.path).name: project.path(each.path) for each in reversed(listed(project))}
    if name not in found:
        raise StudioError(f"There is no export {name!r}.", f"There are: {', '.join(found) or 'none yet'}.")
    return found[name]


def kind_of(output: Output) -> str:
    """What it is for, as in FORMATS."""
    return "merged" if output.kind == "merged" else str(output.detail.get("kind", "gguf"))


def passed(output: Output) -> bool:
    """Whether it answers as what was trained."""
    return bool(output.detail.get("passed", output.detail.get("verified")))


def uses(kind: str, folder: Path, base: str, file: str = "") -> Iterator[Use]:
    """The commands that run an export: what Ollama, llama.cpp, vLLM, LMDeploy and transformers are told."""
    name, place = slugify(folder.name), str(folder)
    if kind == "ollama":
        model = str(folder / "Modelfile")
        command = f"{shlex.join(['ollama', 'create', name, '-f', model])}\n{shlex.join(['ollama', 'run', name])}"
        yield Use("Ollama", command, has_ollama())
    if kind in ("ollama", "gguf"):
        yield use("llama.cpp", ["llama-server", "-m", str(folder / file), "--jinja"])
    if kind == "merged":
        yield use("vLLM", ["vllm", "serve", place, "--served-model-name", name])
        yield use("LMDeploy", ["lmdeploy", "serve", "api_server", place, "--model-name", name])
        yield use("transformers", ["transformers", "serve", place])
    if kind == "adapter":
        yield from server_lines(base, {name: folder})
