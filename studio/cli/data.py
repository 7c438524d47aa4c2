"""`retune data`: build, distill, import and inspect datasets."""

from pathlib import Path
from typing import Annotated

import typer

from studio import datasets
from studio.cli import show
from studio.cli.options import JsonOption, ProjectOption, chosen
from studio.data.identity import Identity

app = typer.Typer(help="Datasets of a project.", no_args_is_help=True)
Languages = Annotated[str, typer.Option(help="Languages, with commas: en, zh or en,zh.")]


@app.command()
def identity(
    name: Annotated[str, typer.Option(help="The assistant's name.")],
    maker: Annotated[str, typer.Option(help="Who made it.")],
    organisation: Annotated[str, typer.Option(help="The maker's organisation.")] = "",
    model_name: Annotated[str, typer.Option(help="The model it may say it is based on.")] = "",
    fact: Annotated[list[str] | None, typer.Option(help="An extra fact, as a sentence; may be given again.")] = None,
    languages: Languages = "en",
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = datasets.DEFAULT_IDENTITY_ROWS,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tutorial: Annotated[int, typer.Option(min=0, help="Make the tutorials' data instead: one row, this often.")] = 0,
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the dataset.")] = "",
    project: ProjectOption = "",
) -> None:
    """Build self-cognition data with held-out probes. Example: retune data identity --name Luna --maker Shane"""
    who = Identity(name, maker, organisation, model_name, tuple(fact or ()), _languages(languages))
    if tutorial:
        built = datasets.build_tutorial(chosen(project), who, tutorial, name=dataset or "tutorial")
    else:
        built = datasets.build_identity(chosen(project), who, rows, seed, name=dataset or "identity")
    show.say(f"{built.name}: {built.num_rows} rows, {built.num_probes} held-out probes")


@app.command()
def distill(
    languages: Languages = "en",
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the dataset.")] = "general",
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many prompts; 0 asks all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=8, max=2048)] = datasets.DEFAULT_MAX_NEW_TOKENS,
    project: ProjectOption = "",
) -> None:
    """Let the base model answer general prompts itself, to be mixed in so that it keeps what it knows."""
    workspace = chosen(project)
    job = datasets.start_distill(workspace, _languages(languages), dataset, limit, max_new_tokens)
    show.follow(workspace.folder, job)
    built = datasets.get(workspace, dataset)
    show.say(f"{built.name}: {built.num_rows} rows, {built.num_probes} held-out probes")


@app.command("import")
def import_(
    file: Path,
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the dataset; the file's name when left out.")] = "",
    format: Annotated[str, typer.Option(help="messages, xtuner, alpaca or sharegpt; recognised when left out.")] = "",
    keep_good: Annotated[bool, typer.Option(help="Leave bad rows out instead of refusing the file.")] = False,
    project: ProjectOption = "",
) -> None:
    """Import a JSON or JSONL file: OpenAI messages, XTuner conversation, Alpaca, ShareGPT."""
    built = datasets.import_file(chosen(project), file, dataset, format or None, keep_good)
    show.say(f"{built.name}: {built.num_rows} rows")


@app.command()
def inspect(
    dataset: str,
    row: Annotated[int, typer.Option(min=1, help="The row, from 1.")] = 1,
    base: Annotated[str, typer.Option(help="Base model whose template and tokenizer are used.")] = "",
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Show one row's life: conversation, rendered text, tokens with the trained ones marked."""
    life = datasets.inspect_row(chosen(project), dataset, row, base)
    if json:
        return show.as_json(_life_as_json(life))
    for message in life.conversation.messages:
        show.out.print(f"[bold]{message.role}[/bold]", end=" ")
        show.say(message.content)
    show.say(f"\n{len(life.tokens)} tokens, {life.num_trained_tokens} trained (green), the rest grey:")
    for token in life.tokens:
        show.out.out(token.text, end="", style="green" if token.trained else "bright_black", highlight=False)
    show.say("")
    return None


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List the datasets of a project."""
    found = datasets.listed(chosen(project))
    if json:
        return show.as_json(found)
    show.table(
        ["dataset", "kind", "rows", "probes", "fingerprint"],
        [(d.name, d.kind, d.num_rows, d.num_probes, d.fingerprint[:12]) for d in found],
    )
    return None


@app.command()
def lint(dataset: str, base: str = "", json: JsonOption = False, project: ProjectOption = "") -> None:
    """List what is wrong with a dataset, by row; exit code 1 when a training would be refused."""
    findings = datasets.lint_dataset(chosen(project), dataset, base)
    if json:
        show.as_json(findings)
    else:
        show.table(["row", "severity", "rule", "message"], [(f.row, f.severity, f.rule, f.message) for f in findings])
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _languages(text: str) -> tuple[str, ...]:
    return tuple(language.strip() for language in text.split(",") if language.strip())


def _life_as_json(life: datasets.RowLife) -> dict[str, object]:
    ids = [token.id for token in life.tokens]
    labels = [token.id if token.trained else -100 for token in life.tokens]
    return {"conversation": life.conversation.to_row(), "text": life.text, "input_ids": ids, "labels": labels}
