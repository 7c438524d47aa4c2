"""`retune data`: build, distill, import, inspect and check datasets."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.cli import data_caches, data_checks, show
from studio.cli import follow as progress
from studio.cli.data_inspect import inspect
from studio.cli.group import group
from studio.cli.lazy import arxiv as papers
from studio.cli.lazy import datasets, files, formats, runs
from studio.cli.lazy import identity as identities
from studio.cli.options import ColumnsOption, JsonOption, ProjectOption, chosen
from studio.cli.options import languages as parsed

if TYPE_CHECKING:
    from studio.config.schema import RunConfig
    from studio.data.files import ReadOptions
    from studio.projects import Project
    from studio.store.datasets import Dataset

SAMPLE_ROWS = 100
app = group("Datasets of a project.")
app.command()(inspect)
for check in (
    data_checks.lint, data_checks.report, data_checks.fix, data_checks.versions, data_checks.undo, data_checks.restore
):  # fmt: skip
    app.command()(check)
app.command()(data_caches.tokenize)
app.command("caches")(data_caches.list_or_delete)
Languages = Annotated[str, typer.Option(help="Languages, with commas: en, zh or en,zh.")]
DatasetArgument = Annotated[str, typer.Argument(help="Name of the dataset.")]
BaseOption = Annotated[str, typer.Option(help="Base model whose template and tokenizer are used.")]


@app.command()
def identity(
    name: Annotated[str, typer.Option(help="The assistant's name.")],
    maker: Annotated[str, typer.Option(help="Who made it.")],
    organisation: Annotated[str, typer.Option(help="The maker's organisation.")] = "",
    model_name: Annotated[str, typer.Option(help="The model it may say it is based on.")] = "",
    fact: Annotated[list[str] | None, typer.Option(help="An extra fact, as a sentence; may be given again.")] = None,
    languages: Languages = "en",
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows; the demo's number when left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes another choice of sentences.")] = 0,
    tutorial: Annotated[
        int, typer.Option(min=0, help="Make the tutorials' data instead: two rows, repeated this often.")
    ] = 0,
    dataset: Annotated[str, typer.Option(help="Name of the dataset; identity or tutorial when left out.")] = "",
    project: ProjectOption = "",
) -> None:
    """Build self-cognition data: who the assistant is, asked in many ways, with held-out probes.

    Example: retune data identity --name Luna --maker Shane --languages en,zh
    """
    who = identities.Identity(name, maker, organisation, model_name, tuple(fact or ()), parsed(languages))
    if tutorial:
        built = datasets.build_tutorial(chosen(project), who, tutorial, dataset or "tutorial")
    else:
        num_rows = rows or datasets.DEFAULT_IDENTITY_ROWS
        built = datasets.build_identity(chosen(project), who, num_rows, seed, dataset or "identity")
    show.say(summary(built))
    for common in datasets.common_names(chosen(project), who):
        show.warn(
            f"{common!r} is a word that ordinary answers use too: the scorecard cannot tell when the model says it "
            "unasked. A rarer name is measured better."
        )


@app.command()
def distill(
    languages: Languages = "en",
    dataset: Annotated[str, typer.Option(help="Name of the dataset.")] = "general",
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many prompts; 0 asks all.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=8, max=2048, help="Longest answer in tokens; the demo's when left out.")
    ] = None,
    project: ProjectOption = "",
) -> None:
    """Let the base model answer general prompts itself, to be mixed in so that it keeps what it knows.

    Example: retune data distill --languages en
    """
    workspace = chosen(project)
    longest = max_new_tokens or datasets.DEFAULT_MAX_NEW_TOKENS
    job = datasets.start_distill(workspace, parsed(languages), dataset, limit, longest)
    progress.follow(workspace.folder, job)
    show.say(summary(datasets.get(workspace, dataset)))


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A file, a folder, hf:ID of the Hugging Face hub, or modelscope:ID.")],
    dataset: Annotated[str, typer.Option(help="Name of the dataset; the file's name when left out.")] = "",
    format: Annotated[
        str, typer.Option(help="A layout or one of XTuner's maps (retune data formats); recognised when left out.")
    ] = "",
    columns: ColumnsOption = "",
    keep_good: Annotated[
        bool, typer.Option("--keep-good", help="Leave bad rows out instead of refusing the file.")
    ] = False,
    sheet: Annotated[str, typer.Option(help="Sheet of a workbook; the first one when left out.")] = "",
    encoding: Annotated[str, typer.Option(help="Encoding of a text file; found out when left out.")] = "",
    split: Annotated[str, typer.Option(help="Split of a hub's data set.")] = "train",
    subset: Annotated[str, typer.Option(help="Subset of a hub's data set, where it has several.")] = "",
    project: ProjectOption = "",
) -> None:
    """Import JSON, JSONL, CSV, TSV, Parquet, XLSX, XLS, text, Markdown, these as .gz, folders of them, or a hub's data.

    Example: retune data import Medication.xlsx --columns question=Question,answer=Answer
    """
    workspace = chosen(project)
    options = files.ReadOptions(encoding, sheet)
    if datasets.imports_at_once(source):
        built = datasets.import_file(workspace, Path(source), dataset, format or None, keep_good, columns, options)
    else:
        job = datasets.start_import(
            workspace, source, dataset, format or None, keep_good, columns, options, split, subset
        )  # fmt: skip
        progress.follow(workspace.folder, job)
        built = datasets.get(workspace, job.args["name"])
    show.say(summary(built))
    if Path(source).exists():
        _say_how_read(Path(source), options, recognised=not (format or columns))
    if built.version > 1:
        before = datasets.versions(workspace, built.name)[1]
        show.warn(
            f"It replaces version {before.number} ({before.kind}, {show.amount(before.num_rows, 'row')}, "
            f"{show.amount(before.num_probes, 'probe')}); "
            f"retune data undo {built.name} takes it back."
        )


def _say_how_read(path: Path, options: ReadOptions, recognised: bool) -> None:
    """The layout that the first rows were recognised as, and an encoding that was found out."""
    if recognised:
        sample = [row.value for row in islice(files.scan(path, options), SAMPLE_ROWS) if not row.problem]
        guess = formats.recognise(sample)
        show.say(f"Read as {guess.name}, {guess.confidence:.0%} sure: {guess.reason}")
    if not options.encoding and (encoding := files.encoding_of(path)) not in ("", "utf-8"):
        show.say(f"Its encoding was recognised as {encoding}; --encoding names another.")


@app.command()
def fetch(
    config: Annotated[str, typer.Argument(help="A config of the project, a file, or a built-in one.")],
    project: ProjectOption = "",
) -> None:
    """Get the datasets that a config says where to find (data.recipes) and the project does not have yet.

    Example: retune data fetch internlm2_1_8b_qlora_alpaca_e3
    """
    from studio.cli.config import find_config

    workspace = chosen(project)
    loaded = find_config(config, workspace)
    if not fetch_data(workspace, loaded):
        show.say(f"Project {workspace.slug} has all datasets that {loaded.name} says where to find.")


def fetch_data(workspace: Project, config: RunConfig) -> int:
    """Get the missing datasets of a config, one after the other, and return how many. Raises DataError, JobError."""
    missing = runs.missing_recipes(workspace, config)
    for name, recipe in missing.items():
        job = runs.start_fetch(workspace, name, recipe)
        progress.follow(workspace.folder, job)
        show.say(summary(datasets.get(workspace, name)))
    return len(missing)


@app.command("formats")
def formats_(json: JsonOption = False) -> None:
    """List the layouts of rows and XTuner's dataset maps, with the columns they read.

    Example: retune data formats
    """
    listed = formats.columns_of_formats()
    if json:
        return show.as_json(listed)
    return show.table(["format", "columns"], [(name, ", ".join(columns)) for name, columns in listed.items()])


@app.command()
def arxiv(
    source: Annotated[Path, typer.Argument(help="The metadata dump of Kaggle, a paper a line.")],
    target: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    category: Annotated[
        list[str] | None, typer.Option(help="May be given again; cs.AI, cs.CL and cs.CV when left out.")
    ] = None,
    start_date: Annotated[str, typer.Option(help="Only papers updated since.")] = "2020-01-01",
) -> None:
    """Pick papers of some categories from arXiv's metadata, to be imported with the format arxiv.

    Example: retune data arxiv arxiv-metadata-oai-snapshot.json papers.json --category cs.CL
    """
    count = papers.select_papers(source, target, category or ["cs.AI", "cs.CL", "cs.CV"], start_date)
    show.say(f"{count} papers in {target}. Next: retune data import {target} --format arxiv")


@app.command("list")
def list_(json: JsonOption = False, project: ProjectOption = "") -> None:
    """List the datasets of a project.

    Example: retune data list --json
    """
    found = datasets.listed(chosen(project))
    if json:
        return show.as_json(found)
    if not found:
        return show.say("No datasets yet. Build one: retune data identity --name Luna --maker Shane")
    rows = [(d.name, d.kind, d.num_rows, d.num_probes, d.fingerprint[:12]) for d in found]
    return show.table(["dataset", "kind", "rows", "probes", "fingerprint"], rows)


@app.command()
def delete(
    dataset: DatasetArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    project: ProjectOption = "",
) -> None:
    """Delete a dataset; the uploaded source file stays.

    Example: retune data delete tutorial --yes
    """
    workspace = chosen(project)
    found = datasets.get(workspace, dataset)
    if not yes:
        typer.confirm(f"Delete dataset {found.name!r} ({show.amount(found.num_rows, 'row')})?", abort=True)
    datasets.delete(workspace, dataset)
    show.say(f"Deleted {dataset}.")


def summary(dataset: Dataset) -> str:
    """`identity: 240 rows, 60 held-out probes`."""
    probes = f", {dataset.num_probes} held-out probes" if dataset.num_probes else ""
    return f"{dataset.name}: {show.amount(dataset.num_rows, 'row')}{probes}"
