"""The suites of a project's folder: those of its own, `suites/<name>.yaml`, and the built-in ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studio.data.files import read_rows
from studio.errors import DataError
from studio.paths import inside, slugify
from studio.probes import built_in
from studio.probes.reading import load_suite
from studio.probes.suite import Suite

FOLDER = "suites"


def own_names(folder: Path) -> list[str]:
    """Names of the project's own suites."""
    return sorted(path.stem for path in inside(folder, FOLDER).glob("[!.]*.yaml"))


def suite_path(folder: Path, name: str) -> Path:
    """The file of a suite of the project's own. Raises DataError for a name that cannot be one."""
    if not name or slugify(name).replace("-", "_") != name.replace("-", "_"):
        raise DataError(
            f"{name!r} cannot name a suite.",
            f"Use lower-case letters, digits, - and _; for example {slugify(name or 'mine')!r}.",
        )
    if name in built_in.NAMES:
        raise DataError(f"{name!r} is the name of a built-in suite.", f"Choose another, for example my-{name}.")
    return inside(folder, f"{FOLDER}/{name}.yaml")


def load(folder: Path, name: str, datasets: Sequence[str] = ()) -> Suite:
    """A suite by its name; a built-in one asks what these datasets held out.

    Raises DataError when there is none of that name or it has nothing to ask, ConfigError when its file is wrong.
    """
    if name in built_in.NAMES:
        return built_in.built_in(name, read_probes(folder, datasets))
    if name not in own_names(folder):
        there = ", ".join([*built_in.NAMES, *own_names(folder)])
        raise DataError(f"There is no suite {name!r} (there are: {there}).", "Make one on the Compare page.")
    return load_suite(suite_path(folder, name))


def read_probes(folder: Path, datasets: Sequence[str]) -> list[dict[str, Any]]:
    """The held-out probes of the named datasets. Raises DataError for one that has none."""
    probes: list[dict[str, Any]] = []
    for name in datasets:
        path = inside(folder, f"data/{name}.probes.jsonl")
        if not path.is_file():
            raise DataError(
                f"The dataset {name!r} has no held-out probes.", "Build it on the Data page; imports have none."
            )
        probes += [row for _, row in read_rows(path) if isinstance(row, dict) and row.get("messages")]
    return probes
