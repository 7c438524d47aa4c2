"""The datasets of a project: built, imported, distilled, edited; what is on disk and what is registered agree."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studio import jobs
from studio.data import common_names as common
from studio.data import identity as identities
from studio.data.files import SUFFIXES, ReadOptions, data_files, scan
from studio.data.formats import Conversation, read_conversations
from studio.data.identity import Identity
from studio.data.intake import HUB_PREFIXES, Reading, Tally, good_rows, keep_source
from studio.data.raw_rows import keep_rows, raw_folder
from studio.errors import DataError
from studio.models import require
from studio.paths import slugify
from studio.projects import Project
from studio.store import dataset_versions as history
from studio.store import datasets as store
from studio.store import open_db
from studio.store.datasets import Dataset, Version
from studio.store.jobs import Job

DEFAULT_IDENTITY_ROWS = 240
DEFAULT_TUTORIAL_REPEATS = 500
DEFAULT_MAX_NEW_TOKENS = 64
AT_ONCE_BYTES = 8 * 2**20


def build_identity(
    project: Project, identity: Identity, num_rows: int = DEFAULT_IDENTITY_ROWS, seed: int = 0, name: str = "identity"
) -> Dataset:
    """Write and register self-cognition rows and their held-out probes."""
    built = identities.build(identity, num_rows, seed)
    origin = {"identity": asdict(identity), "seed": seed}
    made_by = f"built for {identity.name}, seed {seed}"
    return save(project, name, built.rows, "identity", origin, built.probes, made_by)


def build_tutorial(
    project: Project, identity: Identity, num_repeats: int = DEFAULT_TUTORIAL_REPEATS, name: str = "tutorial"
) -> Dataset:
    """The tutorials' data: one or two rows, repeated. The probes are the same as the identity builder's."""
    probes = identities.held_out_probes(identity)
    rows = identities.tutorial(identity, num_repeats)
    made_by = f"the tutorials' rows for {identity.name}, {num_repeats} times"
    return save(project, name, rows, "tutorial", {"identity": asdict(identity)}, probes, made_by)


def common_names(project: Project, identity: Identity) -> list[str]:
    """Those of name and maker that the base model's ordinary answers may say: its leakage cannot be measured."""
    general = [dataset.name for dataset in listed(project) if dataset.kind == "general"]
    probes = [probe for name in general for probe in load_probes(project, name)]
    return common.common_names(identity, [str(probe.get("reference") or "") for probe in probes])


def start_distill(
    project: Project,
    languages: Sequence[str] = ("en",),
    name: str = "general",
    limit: int = 0,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    base: str = "",
) -> Job:
    """Let the base model answer the general prompts itself, in a job; `limit` 0 takes all prompts."""
    base = base or project.base
    require(base)
    args = {
        "base": base, "dataset": checked_name(name), "languages": list(languages), "limit": limit,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    return jobs.start(project.folder, "distill", args, title=f"distill {name}")


def import_file(
    project: Project,
    path: Path,
    name: str = "",
    format: str | None = None,
    keep_good: bool = False,
    columns: str = "",
    options: ReadOptions | None = None,
) -> Dataset:
    """Take a file or folder of any known kind into the project at once, and keep a copy of it.

    `format` None recognises each row; `columns` says by hand which is what (question=…,answer=…). Raises DataError
    that lists the bad rows; with `keep_good` these are left out instead.
    """
    reading = Reading(format or "", columns, keep_good)
    reading.check()
    name = checked_name(name or dataset_name(path))
    rows = list(good_rows(scan(path, options), reading, path.name, Tally()))
    source, raw = keep_source(project.folder, path), raw_folder(name)
    origin = {"file": path.name, "source": project.relative(source), "raw": raw} | reading.origin()
    conversations = keep_rows(project.path(raw), rows)
    return save(project, name, conversations, "import", origin, made_by=f"imported from {path.name}")


def start_import(
    project: Project,
    source: str | Path,
    name: str = "",
    format: str | None = None,
    keep_good: bool = False,
    columns: str = "",
    options: ReadOptions | None = None,
    split: str = "train",
    subset: str = "",
) -> Job:
    """As `import_file` in a job, in bounded memory: files of any size, and hf:ID or modelscope:ID.

    The job's result says `dataset`, `num_rows` and `num_left_out`. Raises DataError for what can be told at once.
    """
    reading = Reading(format or "", columns, keep_good)
    reading.check()
    hub = str(source) if str(source).startswith(HUB_PREFIXES) else ""
    if not hub:
        data_files(Path(source))
    name = checked_name(name or dataset_name(Path(hub or source)))
    where = {"hub": hub, "split": split, "subset": subset} if hub else {"path": str(Path(source).resolve())}
    args = {"name": name, **where, **asdict(reading), **asdict(options or ReadOptions())}
    return jobs.start(project.folder, "import", args, title=f"import {name}", needs_device=False)


def imports_at_once(source: str | Path) -> bool:
    """Whether a source is small enough to be imported without a job. Raises DataError when it is not there."""
    if str(source).startswith(HUB_PREFIXES):
        return False
    return sum(file.stat().st_size for file in data_files(Path(source))) <= AT_ONCE_BYTES


def dataset_name(path: Path) -> str:
    """The name a dataset gets from its file: chats of `Chats.jsonl.gz`."""
    name = path.name.rpartition(":")[2]
    known = (*SUFFIXES, ".gz")
    while Path(name).suffix.lower() in known:
        name = Path(name).stem
    return slugify(name)


def save(
    project: Project,
    name: str,
    conversations: Iterable[Conversation],
    kind: str = "",
    origin: dict[str, Any] | None = None,
    probes: Sequence[dict[str, Any]] = (),
    made_by: str = "",
    expected_version: int | None = None,
) -> Dataset:
    """Make rows the new version of a dataset, made anew with `kind`, else edited. Raises DataError.

    With `expected_version`, it is refused when the dataset is at another version by now.
    """
    name = checked_name(name)
    return history.save(project.folder, name, conversations, kind, origin, probes, made_by, expected_version)


def edit_row(
    project: Project, name: str, row: int, conversation: Conversation | None, expected_version: int
) -> Dataset:
    """Put a conversation in the place of row `row` (from 1), or take the row out with None. Raises DataError."""
    rows = load(project, name)
    _require_row(name, row, len(rows))
    rows[row - 1 : row] = [conversation] if conversation else []
    made_by = f"row {row} {'edited' if conversation else 'deleted'}"
    return save(project, name, rows, made_by=made_by, expected_version=expected_version)


def _require_row(name: str, row: int, num_rows: int) -> None:
    if not 1 <= row <= num_rows:
        raise DataError(f"Dataset {name!r} has no row {row}.", f"Its rows are 1 to {num_rows}.")


def versions(project: Project, name: str) -> list[Version]:
    """What a dataset was, newest first; the first one is what it is now."""
    with open_db(project.folder) as db:
        return store.versions(db, name)


def undo(project: Project, name: str, expected_version: int | None = None) -> Dataset:
    """Take the last change back, as a new version. Raises DataError when there is none."""
    return history.undo(project.folder, checked_name(name), expected_version)


def restore(project: Project, name: str, number: int, expected_version: int | None = None) -> Dataset:
    """Bring version `number` back, as a new version. Raises DataError."""
    return history.restore(project.folder, checked_name(name), number, expected_version)


def listed(project: Project) -> list[Dataset]:
    with open_db(project.folder) as db:
        return store.listed(db)


def get(project: Project, name: str) -> Dataset:
    """Raises DataError, naming the datasets there are."""
    with open_db(project.folder) as db:
        dataset = store.get(db, name)
    return history.settle(project.folder, dataset)


def load(project: Project, name: str, version: int = 0) -> list[Conversation]:
    """All rows of a registered dataset, as it is or as it was in a version."""
    return read_conversations(history.rows_file(project.folder, name, version), "messages")


def stream(project: Project, name: str, version: int = 0) -> Iterator[Conversation]:
    """As `load`, row by row in bounded memory. Raises DataError at a row that cannot be read."""
    return history.stream(project.folder, name, version)


def load_probes(project: Project, name: str) -> list[dict[str, Any]]:
    """The held-out probes of a dataset; empty when it has none."""
    return history.load_probes(project.folder, checked_name(name))


def delete(project: Project, name: str, expected_version: int | None = None) -> None:
    """Forget a dataset with all its versions and delete its files; the uploaded source stays.

    Raises DataError when there is none, or when it is at another version than `expected_version`.
    """
    history.delete(project.folder, get(project, name).name, expected_version)


def checked_name(name: str) -> str:
    """A dataset's name as it was given. Raises DataError when it is not one that files and configs can bear."""
    if not name or slugify(name).replace("-", "_") != name.replace("-", "_"):
        raise DataError(
            f"{name!r} cannot name a dataset.",
            f"Use lower-case letters, digits, - and _; for example {slugify(name or 'data')!r}.",
        )
    return name


def probes_path(project: Project, name: str) -> Path:
    return project.path("data", f"{checked_name(name)}.probes.jsonl")
