"""The Kaggle arXiv dump (JSON lines) made smaller: papers of some categories from a day on, for the map `arxiv`."""

import datetime
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from studio.errors import DataError
from studio.paths import atomic_path

Paper = dict[str, object]


def select_papers(source: Path, target: Path, categories: Collection[str], start_date: str) -> int:
    """Write the papers that have one of the categories and were updated since, as one JSON list; returns their number.

    `start_date` is YYYY-MM-DD. Raises DataError for a line that is no paper.
    """
    try:
        start = datetime.date.fromisoformat(start_date)
    except ValueError:
        raise DataError(f"{start_date!r} is no date.", "Write it as 2020-01-31.") from None
    if not source.is_file():
        raise DataError(f"There is no file {str(source)!r}.", "Give arxiv-metadata-oai-snapshot.json of Kaggle.")
    count = 0
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for paper in _papers(source):
            if set(str(paper["categories"]).split()) & set(categories) and _updated(paper) >= start:
                file.write((",\n" if count else "[\n") + json.dumps(paper, ensure_ascii=False))
                count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _papers(source: Path) -> Iterator[Paper]:
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                paper = json.loads(line)
            except (ValueError, RecursionError):
                paper = None
            if not isinstance(paper, dict) or not {"categories", "update_date"} <= set(paper):
                raise DataError(f"Line {number} of {source.name} is no paper.", "It needs categories and update_date.")
            yield paper


def _updated(paper: Paper) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(paper["update_date"])[:10])
    except ValueError:
        return datetime.date.min
