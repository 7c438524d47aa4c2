"""`retune`: everything that the pages can do, for the shell. Errors are sentences; `--json` prints data."""

import sys

import typer

from studio.cli import chat, config, data, demo, doctor, models, project, runs, show, train, weights
from studio.errors import StudioError

app = typer.Typer(
    name="retune",
    help="Fine-tune a chat model on one machine, and prove what changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(project.app, name="project")
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(runs.app, name="runs")
app.add_typer(weights.app, name="convert")
app.command()(train.train)
app.command()(weights.evaluate)
app.command()(chat.chat)
app.command()(chat.serve)
app.command()(doctor.doctor)
app.command()(demo.demo)


def main() -> None:
    """The command's entry: a StudioError becomes one message and exit code 1."""
    try:
        app()
    except StudioError as error:
        show.fail(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
