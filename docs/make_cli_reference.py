"""Writes docs/cli.md, the reference of the `retune` command, from the command itself.

    python docs/make_cli_reference.py

A test compares the page with what this makes, so a command cannot change without its page.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from typer.main import get_command  # noqa: E402

from studio.cli.app import app  # noqa: E402
from studio.cli.group import ORDER  # noqa: E402

PAGE = REPOSITORY / "docs" / "cli.md"
HEAD = """\
# The `retune` command

Everything that the pages can do, for the shell. This page is made by `python docs/make_cli_reference.py`.

- `-h` or `--help` after any command explains it; `retune --version` prints the version.
- `--project` names a project by its slug or its name; without it the newest project is meant.
- Hyphens and underscores in a command's name are one: `pth-to-hf` is `pth_to_hf`.
- Exit codes: 0 good; 1 an error, told in one message on stderr; 2 a misspelt command or option.
- `--json` prints data for scripts. Colours and live bars appear on a terminal only.
- Long work runs in a process of its own. Ctrl-C asks it to stop (a training saves first), a second Ctrl-C kills it.
- Environment: `RETUNE_HOME` (the folder that holds `projects/`), `RETUNE_MODELS` (base models), `RETUNE_LOCKS` (locks
  on devices, shared by all studios of this machine), `HF_ENDPOINT` and
  `PIP_INDEX_URL` (mirrors), `HF_TOKEN` (models that ask for one).

The same from Python or without an installed command: `python -m studio.cli.app ...`.
"""


def page() -> str:
    """The whole reference as Markdown."""
    parts = [HEAD]
    root = get_command(app)
    for name in ORDER:
        parts += _sections(f"retune {name}", root.commands[name])
    return "\n".join(parts)


def commands(prefix: str = "retune", command: Any = None) -> Iterator[tuple[str, Any]]:
    """(full name, command) of every command; groups are left out."""
    command = command or get_command(app)
    if not hasattr(command, "commands"):
        yield prefix, command
        return
    for name, child in command.commands.items():
        yield from commands(f"{prefix} {name}", child)


def _sections(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        yield f"## {name}\n\n{command.help}\n"
        for child_name, child in command.commands.items():
            yield _section(f"{name} {child_name}", child, "###")
    else:
        yield _section(name, command, "##")


def _section(name: str, command: Any, mark: str) -> str:
    lines = [f"{mark} {name}", "", *_text(command.help), ""]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    shown = [*map(_argument, arguments), *(_option(one) for one in options if one.name != "help" and not one.hidden)]
    if shown:
        lines += ["| | meaning | default |", "| --- | --- | --- |", *shown, ""]
    return "\n".join(lines)


def _text(help: str) -> Iterator[str]:
    for paragraph in help.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if words.startswith("Example: "):
            yield f"```\n{words.removeprefix('Example: ')}\n```"
        else:
            yield words + "\n"


def _argument(argument: Any) -> str:
    default = "required" if argument.required else _default(argument.default)
    return f"| `{argument.name.upper()}` | {_cell(argument.help)} | {default} |"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    value = "" if option.is_flag else f" `{option.metavar or 'VALUE'}`"
    default = "required" if option.required else "" if option.is_flag else _default(option.default)
    again = " May be given again." if option.multiple and "again" not in (option.help or "") else ""
    return f"| {names}{value} | {_cell(option.help)}{again} | {default} |"


def _default(value: Any) -> str:
    return "" if value in (None, "", ()) else f"`{value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)}")
