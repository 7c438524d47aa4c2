"""`retune`: everything that the pages can do, for the shell. Errors are sentences; `--json` prints data."""

from importlib import metadata
from typing import Annotated

import typer

from studio.cli import (
    built_in,
    bundle,
    chat,
    checkpoints,
    config,
    conversations,
    data,
    demo,
    doctor,
    estimate,
    evaluate,
    evaluations,
    export,
    harness,
    jobs,
    models,
    project,
    recommend,
    runs,
    server,
    studio,
    suite,
    train,
    weights,
    xtuner,
)
from studio.cli.group import HELP_OPTIONS, Edge

app = typer.Typer(
    name="retune",
    cls=Edge,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=HELP_OPTIONS,
    epilog="Each command shows an example: retune train --help",
)
app.add_typer(project.app, name="project")
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command("list-cfg")(built_in.list_cfg)
app.command("copy-cfg")(built_in.copy_cfg)
app.command()(estimate.estimate)
app.command()(train.train)
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(weights.app, name="convert")
app.add_typer(export.app, name="export")
app.command()(evaluate.evaluate)
app.add_typer(evaluations.app, name="evaluations")
app.add_typer(suite.app, name="suite")
app.command("lm-eval")(harness.lm_eval)
app.command()(recommend.recommend)
app.command()(recommend.compare)
app.command()(bundle.bundle)
app.command()(bundle.reproduce)
app.command()(chat.chat)
app.command()(chat.agent)
app.command()(chat.selftest)
app.command()(chat.serve)
app.add_typer(server.app, name="server")
app.add_typer(conversations.app, name="conversations")
app.add_typer(jobs.app, name="jobs")
app.command()(demo.demo)
app.command()(studio.studio)
app.command()(doctor.doctor)
app.command("xtuner", context_settings=xtuner.AS_TYPED)(xtuner.xtuner)
for name in xtuner.ALIASES:
    app.command(name, context_settings=xtuner.AS_TYPED, hidden=True)(xtuner.alias)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retune {metadata.version('retune')}")
        raise typer.Exit


@app.callback()
def retune(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune a chat model on one machine, and prove what changed."""


def main() -> None:
    """The command's entry."""
    app()


if __name__ == "__main__":
    main()
