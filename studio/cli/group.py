"""Groups of commands: hyphens and underscores are one, and every expected fault leaves as one message with exit 1."""

from typing import Any

import typer
from typer.core import TyperGroup

from studio.cli import show
from studio.errors import StudioError
from studio.paths import as_studio_error

# The order of the work, for the list of commands.
ORDER = (
    "demo", "studio", "project", "models", "data", "config", "list-cfg", "copy-cfg", "estimate", "train", "runs",
    "checkpoints", "convert", "export", "suite", "evaluate", "evaluations", "lm-eval", "recommend", "compare",
    "bundle", "reproduce", "chat", "agent", "selftest", "serve", "server", "conversations", "jobs", "doctor", "xtuner",
    "list-dataset-format", "log-dataset", "check-custom-dataset", "test", "preprocess", "mmbench", "eval-refcoco",
)  # fmt: skip
INNER = "inner"
"""`obj` of a command line that another one runs: what goes wrong is the outer one's to say."""
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class Verbs(TyperGroup):
    """`pth-to-hf` and `pth_to_hf` name the same command."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        spellings = (cmd_name, cmd_name.replace("-", "_"), cmd_name.replace("_", "-"))
        found = (super(Verbs, self).get_command(ctx, spelling) for spelling in spellings)
        return next((command for command in found if command is not None), None)


class Edge(Verbs):
    """The outermost group. What a person can mend is a sentence; anything else is our fault and keeps its trace."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StudioError as error:
            if ctx.obj == INNER:
                raise
            show.fail(str(error))
        except BrokenPipeError:
            show.drop_output()  # the reader of a pipe, such as `head`, has seen enough
        except OSError as error:
            show.fail(str(as_studio_error(error)))
        raise typer.Exit(1)


def group(help: str) -> typer.Typer:
    """A sub-command's group; alone, it prints its help."""
    return typer.Typer(cls=Verbs, help=help, no_args_is_help=True, context_settings=HELP_OPTIONS)
