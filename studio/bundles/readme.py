"""What a bundle says to a person who opens it: what it is, what is inside, and the commands that run it again."""

import shlex
from collections.abc import Iterator, Sequence

from studio.bundles.content import Data, Manifest

PIP_NAMES = ("torch", "transformers", "peft", "tokenizers", "numpy", "accelerate", "deepspeed", "bitsandbytes")


def commands(run_id: str, base: str, is_folder: bool, sets: Sequence[Data]) -> Iterator[str]:
    """Shell lines: all of it, then the training alone by hand, in an unpacked bundle."""
    yield "retune reproduce BUNDLE.zip"
    named = shlex.quote(f"PATH/TO/{base}" if is_folder else base)
    yield f"retune project new {run_id} --base {named}"
    for data in sets:
        if data.learned:
            yield f"retune data import data/{data.name}.jsonl --dataset {data.name} --project {run_id}"
    yield f"retune train config.yaml --project {run_id}" + (f" --set model.base={named}" if is_folder else "")


def readme(manifest: Manifest) -> str:
    """README.md of a bundle."""
    run, ending = manifest.run, manifest.circumstances
    packages = " ".join(f"{name}=={ending[name]}" for name in PIP_NAMES if name in ending)
    lines = [
        f"# {run.id}: a run that can be run again",
        "",
        f"`retune reproduce` on this file trains the run again ({run.method} on {manifest.base}, {run.step} of "
        f"{run.num_steps} steps), scores it as it was scored, and compares. `--dry-run` only tells what it would do.",
        "",
        _rows_words(manifest),
        "",
        "| dataset | version | rows | probes | fingerprint |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {each.name} | {each.version} | {each.num_rows} | {each.num_probes} | {each.fingerprint} |"
            for each in manifest.datasets
        ),
        "",
        f"Base model: fingerprint {manifest.base_fingerprint}. Seed: {manifest.seed}.",
        "",
        "## Trained under",
        "",
        *(f"- {name}: {value}" for name, value in ending.items()),
        "",
        *(["The same packages:", "", f"    pip install {packages}", ""] if packages else []),
        "## Commands",
        "",
        *(f"    {command}" for command in manifest.commands),
        "",
    ]
    return "\n".join(lines)


def _rows_words(manifest: Manifest) -> str:
    if manifest.has_rows:
        return "**The rows are inside**, with the held-out questions and what the models said. Mind who gets this file."
    return "The rows are not inside: who runs it again brings them, and they are known by their fingerprints."
