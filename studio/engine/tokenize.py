"""The `tokenize` verb: datasets become tokens in the project's cache, which training finds there. No torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from studio.config.schema import DataSection
from studio.data.cache import TokenCache, open_or_build
from studio.data.named import Template, load_template
from studio.data.tokens import TextTokenizer
from studio.engine.job import JobContext
from studio.models import require
from studio.paths import inside
from studio.store import dataset_versions, datasets, open_db
from studio.store.datasets import Dataset

STOP_CHECK_ROWS = 4096

Versions = Mapping[str, Mapping[str, Any]]  # dataset -> {"version", "fingerprint"}


def run(job: JobContext) -> dict[str, Any]:
    """Tokenise datasets. Args: base, and of a config's data section sources, template, max_length and loss_on.

    The result has `caches`, for each dataset its key and counts.
    """
    data = DataSection.model_validate(job.args["data"])
    folder = require(job.args["base"])
    job.phase("tokenising", unit="rows")
    template, tokenizer = load_template(data.template, folder), TextTokenizer.load(folder)
    tokens = tokenise(job.folder, data, stored_sources(job.folder, data), template, tokenizer, reporting(job))
    return {"caches": [_summary(cache) for _, cache in tokens]}


def tokenise(
    folder: Path,
    data: DataSection,
    sources: Mapping[str, Dataset],
    template: Template,
    tokenizer: TextTokenizer,
    progress: Callable[[int, int], None] = lambda current, total: None,
) -> Iterator[tuple[str, TokenCache]]:
    """Each source with its tokens, from the project's cache or into it. `progress` gets rows done and rows in all."""
    total, done = sum(source.num_rows for source in sources.values()), 0
    for name, source in sources.items():
        report = partial(_report, progress, done, total)
        path = inside(folder, source.path)
        tokens = open_or_build(folder, name, path, template, tokenizer, data.max_length, data.loss_on, report)
        done += tokens.info.num_rows
        yield name, tokens


def stored_sources(folder: Path, data: DataSection, versions: Versions | None = None) -> dict[str, Dataset]:
    """The config's sources as the project has them, or as they were in the `versions` that a run remembers.

    Raises DataError when one is not there.
    """
    return {name: _stored(folder, name, (versions or {}).get(name, {})) for name in data.sources}


def _stored(folder: Path, name: str, wanted: Mapping[str, Any]) -> Dataset:
    number, digest = wanted.get("version", 0), wanted.get("fingerprint", "")
    path = dataset_versions.rows_file(folder, name, number, digest)
    with open_db(folder) as db:
        dataset = datasets.get(db, name)
        version = datasets.version(db, name, number or dataset.version)
    place = str(path.relative_to(folder.resolve()))
    return replace(
        dataset, path=place, version=version.number, fingerprint=version.fingerprint, num_rows=version.num_rows
    )


def reporting(job: JobContext) -> Callable[[int, int], None]:
    """Progress into the job's row, and a look now and then at whether it should stop."""

    def report(current: int, total: int) -> None:
        job.progress(current, total, "rows")
        if current % STOP_CHECK_ROWS == 0:
            job.check_stop()

    return report


def _report(progress: Callable[[int, int], None], before: int, total: int, num_rows: int) -> None:
    progress(before + num_rows, max(total, before + num_rows))


def _summary(tokens: TokenCache) -> dict[str, Any]:
    info = tokens.info
    names = ("dataset", "key", "num_rows", "num_tokens", "num_trained_tokens", "num_truncated", "num_untrained")
    return {name: getattr(info, name) for name in (*names, "longest")}
