"""The verb `check`: the lint of a large dataset in a job. No torch."""

from typing import Any

from studio.engine.job import JobContext
from studio.engine.tokenize import reporting
from studio.store.checks import Tokens, lint_rows


def run(job: JobContext) -> dict[str, Any]:
    """Lint a dataset; the findings are kept in the project. Args: dataset, and `tokens` as `Tokens` or null."""
    job.phase("checking the rows", unit="rows")
    result = lint_rows(job.folder, job.args["dataset"], tokens_of(job), progress=reporting(job))
    return {"num_errors": result.num_errors, "num_warnings": result.num_warnings}


def tokens_of(job: JobContext) -> Tokens | None:
    values = job.args.get("tokens")
    return Tokens(**values) if values else None
