"""`retune list-cfg` and `retune copy-cfg`: the built-in configs, XTuner's names among them."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import Annotated

import typer

from studio.cli import show
from studio.cli.lazy import catalog
from studio.cli.options import JsonOption, base_model
from studio.errors import ConfigError, Problem
from studio.paths import atomic_write_text

COPY_SUFFIX = "_copy"


def list_cfg(
    pattern: Annotated[str, typer.Option("--pattern", "-p", help="Only names that hold this, whatever its case.")] = "",
    json: JsonOption = False,
) -> None:
    """List the built-in configs: XTuner's 576, its DeepSpeed presets, and those for the starter model.

    {model}_{qlora|lora|full}_{data}_e{N} names others, for every model in the table of docs/configs.md.

    Example: retune list-cfg -p internlm2_1_8b
    """
    names = catalog.listed(pattern)
    if json:
        return show.as_json(names)
    if not names:
        return show.say(f"No built-in config has {pattern!r} in its name.")
    for name in names:
        print(name)


def copy_cfg(
    name: Annotated[str, typer.Argument(help="A built-in config, or qlora_alpaca_e3 with a base of your own.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the copy goes; made when it is not there.")],
    base: Annotated[str, typer.Option(help="Another base model: an id, modelscope:ID or a folder.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a copy that is there.")] = False,
) -> None:
    """Copy a built-in config to DIR/NAME_copy.yaml, with comments that say what each value comes from.

    Example: retune copy-cfg internlm2_1_8b_qlora_alpaca_e3 .
    """
    is_json = name in catalog.DEEPSPEED_NAMES
    path = directory / f"{name}{COPY_SUFFIX}{'.json' if is_json else '.yaml'}"
    text = _deepspeed_text(name) if is_json else catalog.copy_text(name, base_model(base))
    if path.exists() and not force:
        raise ConfigError([Problem("file", f"{path} is there already", "--force replaces it")], "copy-cfg")
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    show.say(f"Copied to {path}")


def _deepspeed_text(name: str) -> str:
    return jsons.dumps(catalog.deepspeed_preset(name), indent=2) + "\n"
