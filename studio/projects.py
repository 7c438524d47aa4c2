"""Workspaces: one folder each, with a database. Create, open, list, archive, delete."""

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from studio import jobs
from studio.errors import ProjectError
from studio.models import resolve
from studio.paths import atomic_write_json, fsync, inside, projects_root, remove, slugify
from studio.store import open_db
from studio.store.records import now

PROJECT_FILE = "project.json"
FOLDERS = ("data/source", "configs", "runs", "hf", "merged", "exports", "reports", "jobs")
MAX_NAME_LENGTH = 120
JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Project:
    """`name` is what the person typed; `slug` is the folder."""

    slug: str
    name: str
    base: str
    created_at: str
    archived_at: str = ""

    @property
    def folder(self) -> Path:
        return projects_root() / self.slug

    def path(self, *parts: str | Path) -> Path:
        """A path inside the project. Raises ProjectError when it would leave it."""
        return inside(self.folder, Path(*parts))

    def relative(self, path: Path) -> str:
        """`path` as it is written in the database: relative to the project."""
        return str(inside(self.folder, path).relative_to(self.folder.resolve()))


def create_project(name: str, base: str = "starter") -> Project:
    """Make a workspace. Any display name will do; the folder gets a safe, unique slug.

    Raises ModelError when `base` does not name a base model; it need not be on this machine yet.
    """
    clean, base = _clean_name(name), base.strip()
    resolve(base)
    root = projects_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".projects.lock", timeout=30):
        slug = slugify(clean, taken={folder.name for folder in root.iterdir()})
        project = Project(slug, clean, base, now())
        for folder in FOLDERS:
            (project.folder / folder).mkdir(parents=True)
        with open_db(project.folder):
            pass
        _save(project)
    return project


def open_project(name: str) -> Project:
    """The project of a slug, else of a display name that one project alone has. Raises ProjectError, naming slugs."""
    there = list_projects(archived=True)
    found = [project for project in there if project.slug == name] or [p for p in there if p.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        slugs = ", ".join(sorted(project.slug for project in found))
        raise ProjectError(f"{len(found)} projects are named {name!r}: {slugs}.", "Say which one by its slug.")
    raise _unknown(name)


def _of_slug(slug: str) -> Project:
    """What hides or deletes goes by the slug alone: a name may be that of several."""
    found = next((project for project in list_projects(archived=True) if project.slug == slug), None)
    if found is None:
        raise _unknown(slug)
    return found


def _unknown(name: str) -> ProjectError:
    names = ", ".join(project.slug for project in list_projects()) or "none yet"
    return ProjectError(
        f"There is no project {name!r} (there are: {names}).", "Make one with `retune project new NAME`."
    )


def list_projects(archived: bool = False) -> list[Project]:
    """Projects, newest first; archived ones on request. A folder without a readable project.json is no project."""
    root = projects_root()
    if not root.is_dir():
        return []
    # A folder with a dot is ours: machine-wide jobs, or what a deletion that was cut short left behind.
    folders = [path for path in root.iterdir() if not path.name.startswith(".") and (path / PROJECT_FILE).is_file()]
    found = [_load(folder) for folder in folders]
    shown = [project for project in found if project and (archived or not project.archived_at)]
    return sorted(shown, key=lambda project: project.created_at, reverse=True)


def archive_project(slug: str, archived: bool = True) -> Project:
    """Hide a project from lists (or show it again); nothing is deleted."""
    project = _of_slug(slug)
    changed = Project(project.slug, project.name, project.base, project.created_at, now() if archived else "")
    _save(changed)
    return changed


def delete_project(slug: str) -> None:
    """Delete a project and all its files. Raises ProjectError while a job of it is live."""
    project = _of_slug(slug)
    live = [job for job in jobs.refresh(project.folder) if job.live]
    if live:
        raise ProjectError(f"Project {project.slug!r} has a running job ({live[0].kind}).", "Stop it first.")
    # Renamed first, so that a crash half-way leaves rubbish and not half a project.
    doomed = project.folder.with_name(f".deleted-{project.slug}")
    remove(doomed)
    project.folder.rename(doomed)
    fsync(doomed.parent)
    remove(doomed)


def _clean_name(name: str) -> str:
    # Control, format and surrogate characters can hide what a name is; joiners are part of emoji and of some scripts.
    normal = unicodedata.normalize("NFC", name)
    text = "".join(c for c in normal if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    text = " ".join(text.split())[:MAX_NAME_LENGTH]
    if not text.strip(JOINERS):
        raise ProjectError("A project needs a name.", "Type at least one visible character.")
    return text


def _save(project: Project) -> None:
    values = {
        "name": project.name,
        "base": project.base,
        "created_at": project.created_at,
        "archived_at": project.archived_at,
    }
    atomic_write_json(project.folder / PROJECT_FILE, values)


def _load(folder: Path) -> Project | None:
    try:
        values = json.loads((folder / PROJECT_FILE).read_text(encoding="utf-8"))
        return Project(
            folder.name,
            str(values["name"]),
            str(values["base"]),
            str(values["created_at"]),
            str(values.get("archived_at", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
