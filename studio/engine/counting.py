"""The verb `report`: what is in a large dataset, counted in a job. No torch."""

from dataclasses import asdict
from typing import Any

from studio.engine.checking import tokens_of
from studio.engine.job import JobContext
from studio.engine.tokenize import reporting
from studio.store.checks import report_rows


def run(job: JobContext) -> dict[str, Any]:
    """Count what is in a dataset; the result has it as `report`. Args as those of `checking.run`."""
    job.phase("counting the rows", unit="rows")
    return {"report": asdict(report_rows(job.folder, job.args["dataset"], tokens_of(job), reporting(job)))}
