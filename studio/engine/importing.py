"""The engine verb `import`: files, folders and data sets of a hub become a dataset, in bounded memory."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studio.data.files import ReadOptions, scan
from studio.data.intake import Reading, Tally, good_rows, keep_source
from studio.data.raw_rows import keep_rows, raw_folder
from studio.data.rows import RawRow
from studio.data.streams import Position
from studio.engine.hub_data import hub_rows
from studio.engine.job import JobContext
from studio.paths import inside
from studio.store import dataset_versions

ROWS_BETWEEN_LOOKS = 256
STOP_CHECK_SECONDS = 1.0


def run(job: JobContext) -> dict[str, Any]:
    """Args: `path` of a file or folder, or `hub` (hf:ID or modelscope:ID) with `split` and `subset`; `name` of the
    dataset; `format`, `columns`, `keep_good` as in `Reading`; `encoding` and `sheet` as in `ReadOptions`.

    A stop leaves the dataset as it was.
    """
    args = job.args
    reading = Reading(args.get("format") or "", args.get("columns") or "", bool(args.get("keep_good")))
    reading.check()
    tally = Tally()
    rows, source, origin = _from_hub(job) if args.get("hub") else _from_path(job)
    raw = raw_folder(args["name"])
    conversations = keep_rows(inside(job.folder, raw), good_rows(_stoppable(job, rows), reading, source, tally))
    dataset = dataset_versions.save(
        job.folder, args["name"], conversations, "import", origin | reading.origin() | {"raw": raw, "job_id": job.id},
        made_by=f"imported from {source}",
    )  # fmt: skip
    _say(tally)
    return {"dataset": dataset.name, "num_rows": dataset.num_rows, "num_left_out": tally.num_bad}


def _from_path(job: JobContext) -> tuple[Iterator[RawRow], str, dict[str, Any]]:
    path = Path(job.args["path"])
    job.phase("copying the source")
    kept = keep_source(job.folder, path)
    job.check_stop()
    options = ReadOptions(job.args.get("encoding") or "", job.args.get("sheet") or "")
    origin = {"file": path.name, "source": kept.relative_to(inside(job.folder, ".")).as_posix()}
    return _with_bytes(job, kept, options), path.name, origin


def _with_bytes(job: JobContext, path: Path, options: ReadOptions) -> Iterator[RawRow]:
    position = Position()
    for number, row in enumerate(scan(path, options, position)):
        if number == 0:
            job.phase("reading", position.total, "bytes")
        if number % ROWS_BETWEEN_LOOKS == 0:
            job.progress(position.done)
        yield row
    job.progress(position.total)


def _from_hub(job: JobContext) -> tuple[Iterator[RawRow], str, dict[str, Any]]:
    source, split, subset = job.args["hub"], job.args.get("split") or "train", job.args.get("subset") or ""
    job.phase("reading", unit="rows")
    rows = hub_rows(source, split, subset, inside(job.folder, "data/source"), job.progress)
    return rows, source, {"hub": source, "split": split} | ({"subset": subset} if subset else {})


def _stoppable(job: JobContext, rows: Iterator[RawRow]) -> Iterator[RawRow]:
    looked_at = time.monotonic()
    for number, row in enumerate(rows):
        if number % ROWS_BETWEEN_LOOKS == 0 and time.monotonic() - looked_at > STOP_CHECK_SECONDS:
            looked_at = time.monotonic()
            job.check_stop()
        yield row


def _say(tally: Tally) -> None:
    """The rows that were left out, in the job's log."""
    for problem in tally.problems:
        print(f"left out: {problem}")
    if tally.num_bad > len(tally.problems):
        print(f"and {tally.num_bad - len(tally.problems)} more rows")
