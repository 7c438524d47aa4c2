"""`retune data lint`, `report`, `fix`, `versions`, `undo`, `restore`: what is wrong with rows, and what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from studio import models
from studio.cli import follow as progress
from studio.cli import show
from studio.cli.lazy import dataset_checks, datasets
from studio.cli.options import JsonOption, ProjectOption, base_model, chosen

if TYPE_CHECKING:
    from studio.data.lint.findings import LintResult
    from studio.data.report import DatasetReport
    from studio.dataset_checks import Tokens
    from studio.projects import Project
    from studio.store.datasets import Dataset

AssistantOption = Annotated[
    str | None, typer.Option(help="Whom the rows teach; remembered with the dataset, an empty name forgets it.")
]
MakerOption = Annotated[str, typer.Option(help="Who made that assistant.")]
DatasetArgument = Annotated[str, typer.Argument(help="Name of the dataset.")]
BaseOption = Annotated[
    str, typer.Option(help="Base model whose template and tokenizer are used; the project's when left out.")
]
TemplateOption = Annotated[str, typer.Option(help="A named template; the tokenizer's own when left out.")]
MaxLengthOption = Annotated[int, typer.Option(min=1, help="Longest sequence in tokens.")]


def lint(
    dataset: DatasetArgument,
    base: BaseOption = "",
    template: TemplateOption = "",
    max_length: MaxLengthOption = 512,
    assistant: AssistantOption = None,
    maker: MakerOption = "",
    limit: Annotated[int, typer.Option(min=0, help="List at most so many findings; 0 lists all that are kept.")] = 100,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """List what is wrong with a dataset, by row; exit code 1 when it has errors.

    With --assistant it looks for other assistants' names too, in any rows, now and from then on.

    Example: retune data lint chats --assistant Luna --maker Shane
    """
    workspace = chosen(project)
    if assistant is not None:
        dataset_checks.teach(workspace, dataset, assistant, maker)
    result = _linted(workspace, dataset, _tokens(workspace, base, template, max_length, quiet=json), quiet=json)
    if json:
        show.as_json(result.findings)
    else:
        _print_findings(dataset, result, limit)
    if result.num_errors:
        raise typer.Exit(1)


def report(
    dataset: DatasetArgument,
    base: BaseOption = "",
    template: TemplateOption = "",
    max_length: MaxLengthOption = 512,
    json: JsonOption = False,
    project: ProjectOption = "",
) -> None:
    """Show what is in a dataset: kinds, sources, turns, languages, duplicates, and lengths in tokens.

    Example: retune data report identity --base starter
    """
    workspace = chosen(project)
    found = _reported(workspace, dataset, _tokens(workspace, base, template, max_length, quiet=json), quiet=json)
    if json:
        return show.as_json(found)
    return _print_report(dataset, found)


def fix(
    dataset: DatasetArgument,
    rule: Annotated[str, typer.Option(help="Fix what this rule found (see retune data lint).")],
    row: Annotated[int, typer.Option(min=0, help="In this row only; 0 for all rows.")] = 0,
    base: BaseOption = "",
    project: ProjectOption = "",
) -> None:
    """Make the safe fixes of a rule, as a new version of the dataset; `retune data undo` takes it back.

    Example: retune data fix chats --rule duplicate
    """
    workspace = chosen(project)
    version = datasets.get(workspace, dataset).version
    dataset_checks.require_rule(rule)
    found = _linted(workspace, dataset, _tokens(workspace, base)).findings
    asked = [each for each in found if each.rule == rule and row in (0, each.row)]
    fixable = [each for each in asked if each.fix]
    if not fixable:
        why = "has no safe fix; edit the rows" if asked else "found nothing"
        return show.say(f"{dataset}: rule {rule} {why}.")
    fixed = dataset_checks.fix(workspace, dataset, fixable, version)
    show.say(f"Fixed {len(fixable)} of {show.amount(len(asked), 'finding')}. {_now(fixed)}")
    return None


def versions(dataset: DatasetArgument, json: JsonOption = False, project: ProjectOption = "") -> None:
    """List the versions of a dataset, newest first, and what made each.

    Example: retune data versions identity
    """
    found = datasets.versions(chosen(project), dataset)
    if json:
        return show.as_json(found)
    rows = [(v.number, v.num_rows, v.made_by, v.created_at[:16], v.fingerprint[:12]) for v in found]
    return show.table(["version", "rows", "made by", "at", "fingerprint"], rows)


def undo(dataset: DatasetArgument, project: ProjectOption = "") -> None:
    """Take the last change of a dataset back, as a new version; again goes one change further back.

    Example: retune data undo identity
    """
    show.say(_now(datasets.undo(chosen(project), dataset)))


def restore(
    dataset: DatasetArgument,
    version: Annotated[int, typer.Argument(min=1, help="Its number, from `retune data versions`.")],
    project: ProjectOption = "",
) -> None:
    """Bring an older version of a dataset back, as a new version.

    Example: retune data restore identity 1
    """
    show.say(_now(datasets.restore(chosen(project), dataset, version)))


def _tokens(
    workspace: Project, base: str, template: str = "", max_length: int = 512, quiet: bool = False
) -> Tokens | None:
    """As `base` makes them, else the project's base; None, which is said unless `quiet`, while that is not here."""
    if not base and not models.resolve(workspace.base).present:
        if not quiet:
            get = f"`retune models fetch {workspace.base}`, or name another with --base"
            show.warn(f"The base model {workspace.base} is not on this machine, so tokens are not looked at: {get}.")
        return None
    return dataset_checks.Tokens(base_model(base) or workspace.base, max_length, template)


def _now(dataset: Dataset) -> str:
    return f"{dataset.name} is at version {dataset.version}: {show.amount(dataset.num_rows, 'row')}."


def _linted(project: Project, dataset: str, tokens: Tokens | None, quiet: bool = False) -> LintResult:
    """Small datasets are checked here, large ones in a job with its bar; a result that is kept comes at once."""
    if known := dataset_checks.known_lint(project, dataset, tokens):
        return known
    if dataset_checks.is_large(datasets.get(project, dataset)):
        job = dataset_checks.start_check(project, dataset, tokens)
        progress.follow(project.folder, job, quiet)
    return dataset_checks.lint_dataset(project, dataset, tokens)


def _reported(project: Project, dataset: str, tokens: Tokens | None, quiet: bool) -> DatasetReport:
    if not dataset_checks.is_large(datasets.get(project, dataset)):
        return dataset_checks.report(project, dataset, tokens)
    if known := dataset_checks.known_report(project, dataset, tokens):
        return known
    job = progress.follow(project.folder, dataset_checks.start_report(project, dataset, tokens), quiet)
    return dataset_checks.DatasetReport.from_json(job.result["report"])


def _print_findings(dataset: str, result: LintResult, limit: int) -> None:
    if not result.counts:
        return show.say(f"{dataset}: nothing to mend.")
    shown = result.findings[: limit or None]
    show.table(
        ["row", "severity", "rule", "message", "fix"], [(f.row, f.severity, f.rule, f.message, f.fix) for f in shown]
    )
    counted = ", ".join(f"{rule} {sum(numbers.values())}" for rule, numbers in sorted(result.counts.items()))
    show.say(f"\n{show.amount(result.num_errors, 'error')}, {show.amount(result.num_warnings, 'warning')}: {counted}")
    if left := result.num_errors + result.num_warnings - len(shown):
        show.say(f"{left} of them {'is' if left == 1 else 'are'} not listed.")
    return None


def _print_report(dataset: str, report: DatasetReport) -> None:
    lines = [
        ("rows", report.num_rows),
        ("kinds", _counted(report.kinds)),
        ("sources", _counted({name or "(none)": number for name, number in report.sources.items()})),
        ("languages", _counted(report.languages)),
        ("turns", _counted(report.turns)),
        ("with a system message", report.num_with_system),
        ("equal to a row before", report.num_duplicates),
        ("longest row", f"{report.longest_row} ({report.longest_characters:,} characters)"),
    ]
    if report.lengths:
        lines += [
            ("tokens", f"{report.num_tokens:,}, {report.trained_share:.1%} of them trained"),
            ("tokens a row", _counted(report.lengths)),
            ("cut / not trained", f"{report.num_truncated} / {report.num_untrained}"),
        ]
    show.table([dataset, ""], lines)
    most = max((rows for *_, rows in report.histogram), default=0)
    bars = [(f"{start}–{below - 1}", rows, "█" * -(-40 * rows // most)) for start, below, rows in report.histogram]
    if bars:
        show.say("")
        show.table(["tokens", "rows", ""], bars)


def _counted(numbers: dict[str, int] | dict[int, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in numbers.items())
