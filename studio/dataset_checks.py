"""Looks at a project's datasets: what the lint finds, what stands in the way of a run, the report, and safe fixes."""

from collections.abc import Sequence
from dataclasses import asdict

from studio import datasets, jobs
from studio.config.schema import RunConfig
from studio.data.identity import Identity
from studio.data.lint.findings import RULES, Finding, LintResult
from studio.data.lint.fixes import FIX_WORDS, apply_fixes
from studio.data.report import DatasetReport
from studio.errors import DataError
from studio.models import resolve
from studio.projects import Project
from studio.store import checks
from studio.store import dataset_versions as history
from studio.store.checks import Progress, Tokens
from studio.store.datasets import Dataset
from studio.store.jobs import Job

__all__ = ["DatasetReport", "Progress", "Tokens"]

AT_ONCE_ROWS = 20_000


def tokens_of(config: RunConfig) -> Tokens:
    """As a run of this config makes them."""
    data = config.data
    return Tokens(config.model.base, data.max_length, data.template, data.loss_on)


def lint_dataset(
    project: Project,
    name: str,
    tokens: Tokens | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> LintResult:
    """What is wrong with a dataset, by row; with `tokens`, also as tokens. `quick` has the errors alone, and encodes
    no more than the first `lint.check.ENCODED_WHEN_QUICK` rows.

    Held-out probes of all the project's datasets are looked for. A result is kept until rows, probes or rules
    change. `progress` gets rows done and rows in all. Raises DataError when the rows cannot be read.
    """
    return checks.lint_rows(project.folder, name, tokens, quick, progress)


def known_lint(project: Project, name: str, tokens: Tokens | None = None) -> LintResult | None:
    """What `lint_dataset` found in the rows as they are now; None when they were not checked yet."""
    return checks.known_lint(project.folder, name, tokens)


def is_large(dataset: Dataset) -> bool:
    """Whether going through all rows is a job."""
    return dataset.num_rows > AT_ONCE_ROWS


def start_check(project: Project, name: str, tokens: Tokens | None = None) -> Job:
    """`lint_dataset` in a job; afterwards `known_lint` has the result."""
    return _start(project, "check", name, tokens)


def start_report(project: Project, name: str, tokens: Tokens | None = None) -> Job:
    """`report` in a job; afterwards `known_report` has it."""
    return _start(project, "report", name, tokens)


def _start(project: Project, kind: str, name: str, tokens: Tokens | None) -> Job:
    dataset = datasets.get(project, name)
    args = {"dataset": name, "tokens": asdict(tokens) if tokens else None, "key": checks.report_key(dataset, tokens)}
    return jobs.start(project.folder, kind, args, title=f"{kind} {name}", needs_device=False)


def newest_job(project: Project, kind: str, name: str, tokens: Tokens | None = None) -> Job | None:
    """The newest job that goes, or went, through the rows as they are now."""
    key = checks.report_key(datasets.get(project, name), tokens)
    return next((job for job in jobs.refresh(project.folder) if job.kind == kind and job.args.get("key") == key), None)


def known_report(project: Project, name: str, tokens: Tokens | None = None) -> DatasetReport | None:
    """The report that a job made of the rows as they are now; None when none did."""
    job = newest_job(project, "report", name, tokens)
    return DatasetReport.from_json(job.result["report"]) if job and job.state == "finished" else None


def require_rule(rule: str) -> None:
    """Raises DataError when the lint has no such rule."""
    if rule not in RULES:
        raise DataError(f"There is no rule {rule!r}.", f"Known: {', '.join(RULES)}.")


def errors_before_start(project: Project, config: RunConfig) -> list[str]:
    """Errors of the config's datasets, as `dataset, row 3: …`, from `lint_before_start`.

    Datasets that are not there have none; `runs.problems_before_start` names them.
    """
    there = {dataset.name for dataset in datasets.listed(project)}
    errors = []
    for name in config.data.sources:
        if name in there:
            errors += _told(name, lint_before_start(project, name, config))
    return errors


def lint_before_start(project: Project, name: str, config: RunConfig) -> LintResult:
    """The check of the rows as this config's tokens when one was made, else a quick one.

    A quick one reads the text of all rows, and the tokens of the first `lint.check.ENCODED_WHEN_QUICK` of them.
    Only while the base model is not on this machine, and nothing can start, is the text alone enough.
    """
    tokens = tokens_of(config) if resolve(config.model.base).present else None
    return known_lint(project, name, tokens) or lint_dataset(project, name, tokens, quick=True)


def _told(name: str, result: LintResult, most: int = 20) -> list[str]:
    errors = [finding for finding in result.findings if finding.severity == "error"]
    told = [f"{name}, row {finding.row}: {finding.message}" for finding in errors[:most]]
    more = result.num_errors - len(told)
    return told + ([f"{name}: {more} more errors"] if more > 0 else [])


def fix(
    project: Project, name: str, findings: Finding | Sequence[Finding], expected_version: int | None = None
) -> Dataset:
    """Make the safe fix of one finding or of several, as one new version. Raises DataError.

    `expected_version` is the version that was checked: it is refused when the dataset is at another one by now.
    """
    wanted = [findings] if isinstance(findings, Finding) else list(findings)
    if not wanted:
        raise DataError(f"Nothing to fix in {name!r}.", "`retune data lint` lists what can be fixed.")
    version = datasets.get(project, name).version if expected_version is None else expected_version
    fixed = apply_fixes(datasets.stream(project, name, version), wanted)
    return datasets.save(project, name, fixed, made_by=_fix_words(wanted), expected_version=version)


def _fix_words(findings: Sequence[Finding]) -> str:
    rules = ", ".join(sorted({finding.rule for finding in findings}))
    done = ", ".join(sorted({FIX_WORDS[finding.fix] for finding in findings if finding.fix in FIX_WORDS}))
    where = f"row {findings[0].row}" if len(findings) == 1 else f"{len(findings)} findings"
    return f"fix of {where} ({rules}): {done}"


def report(
    project: Project, name: str, tokens: Tokens | None = None, progress: Progress | None = None
) -> DatasetReport:
    """What is in a dataset; with `tokens`, also how long its rows are and how much of them is trained."""
    return checks.report_rows(project.folder, name, tokens, progress)


def teach(project: Project, name: str, assistant: str, maker: str = "") -> Dataset:
    """Remember with a dataset whom its rows teach, so that the lint knows rival names; "" forgets it.

    Raises DataError for a name that cannot be one, and for a dataset that was built for an identity.
    """
    dataset = datasets.get(project, name)
    if dataset.origin.get("identity"):
        raise DataError(f"{name!r} was built for {checks.identity_of(dataset).name}.", "Build it anew for another one.")
    told = None
    if assistant.strip():
        identity = Identity(assistant, maker.strip() or assistant)
        told = {"name": identity.name, "maker": identity.maker if maker.strip() else ""}
    return history.note(project.folder, name, {checks.TEACHES: told})
