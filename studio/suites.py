"""What a person does with a project's probe suites; pages and shell call these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from studio.config.yaml import plain_values, read_text, read_tree, tree_text
from studio.errors import DataError
from studio.paths import slugify
from studio.probes import built_in, library
from studio.probes.promptfoo import Imported, read_promptfoo
from studio.probes.reading import parse_suite, save_suite, suite_text
from studio.probes.suite import Suite
from studio.projects import Project

ADDED = "added"


def names(project: Project) -> list[str]:
    """All suites that can be asked: the built-in ones, then the project's own."""
    return [*built_in.NAMES, *library.own_names(project.folder)]


def text_of(project: Project, name: str) -> str:
    """The text of a suite of the project's own, as it was written. Raises DataError when it is not there."""
    path = library.suite_path(project.folder, name)
    if not path.is_file():
        raise DataError(f"There is no suite {name!r} of this project.", "`retune suite list` names those there are.")
    return path.read_text(encoding="utf-8")


def save_text(project: Project, name: str, text: str, new: bool = False) -> Suite:
    """Check a suite and write it; with `new` the name must be free.

    Raises ConfigError with the line of every mistake, DataError for a name that cannot be used.
    """
    path = library.suite_path(project.folder, name)
    with _lock(project):
        if new and path.exists():
            raise DataError(f"There is a suite {name!r} already.", "Choose another name, or edit that one.")
        return save_suite(path, text)


def copy_built_in(project: Project, suite: Suite, name: str) -> Suite:
    """A suite of the project's own with what a built-in one asks, to be edited."""
    return save_text(project, name, suite_text(suite), new=True)


def name_for(file_name: str) -> str:
    """A name for the suite of a file."""
    return slugify(Path(file_name).stem)


def import_file(project: Project, path: Path, name: str = "") -> Imported:
    """A new suite of the project's own from a file: a suite of ours, or a config of promptfoo.

    Raises ConfigError with the line of every mistake, DataError where nothing of it can be asked.
    """
    return import_text(project, read_text(path), name or name_for(path.name))


def import_text(project: Project, text: str, name: str) -> Imported:
    """The same from the text of a file."""
    tree = read_tree(text, name)
    if isinstance(tree, dict) and "prompts" in tree and "groups" not in tree:
        found = read_promptfoo(text, name)
        return Imported(save_text(project, name, suite_text(found.suite), new=True), found.left_out)
    return Imported(save_text(project, name, text, new=True), ())


def delete(project: Project, name: str) -> None:
    """Delete a suite of the project's own; what it measured stays."""
    text_of(project, name)
    library.suite_path(project.folder, name).unlink()


def add_probe(project: Project, suite_name: str, probe: Mapping[str, Any], group: str = ADDED) -> Suite:
    """Add a probe to a group of a suite of the project's own; suite and group are made when they are not there.

    `probe` is as in a suite's file: {"ask": "When do you open?", "assert": [{"type": "contains", "value": "9"}]}, or
    with `turns` or `messages` in place of `ask`; optionally `system`, `language`, `reference`. Comments of the file
    stay. Raises ConfigError when it is no probe, DataError for a name that cannot be used.
    """
    path = library.suite_path(project.folder, suite_name)
    with _lock(project):
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        return save_suite(path, with_probe(before, suite_name, probe, group))


def with_probe(text: str, suite_name: str, probe: Mapping[str, Any], group: str = ADDED) -> str:
    """The text of a suite ("" for none yet) with one more probe. Raises ConfigError when that is no suite."""
    if text.strip():
        parse_suite(text, suite_name)
    tree = read_tree(text, suite_name) if text.strip() else {"groups": []}
    found = next((each for each in tree["groups"] if each["name"] == group), None)
    if found is None:
        tree["groups"].append({"name": group, "probes": [plain_values(dict(probe))]})
    else:
        found["probes"].append(plain_values(dict(probe)))
    changed = tree_text(tree)
    parse_suite(changed, suite_name)
    return changed


def _lock(project: Project) -> FileLock:
    folder = Path(project.path(library.FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock", timeout=30)
