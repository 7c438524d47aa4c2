"""The token caches of a project: made ahead in a job, listed with their size, deleted."""

from studio import jobs
from studio.config.schema import DataSection
from studio.data import cache
from studio.data.cache import CacheInfo
from studio.models import require
from studio.projects import Project
from studio.store.jobs import Job


def start(project: Project, data: DataSection, base: str = "") -> Job:
    """Tokenise the sources of a config's data section for a base model, in a job; the project's base when it is "".

    A run of the same config finds the tokens there. The job's result has `caches`, one for each dataset.
    """
    base = base or project.base
    require(base)
    args = {"base": base, "data": data.model_dump(mode="json")}
    title = f"tokenize {', '.join(data.sources)}"
    return jobs.start(project.folder, "tokenize", args, title=title, needs_device=False)


def listed(project: Project) -> list[CacheInfo]:
    """All caches, newest first."""
    return cache.listed(project.folder)


def delete(project: Project, key: str) -> None:
    """Delete one; it is built again when it is needed. Raises DataError when there is none."""
    cache.delete(project.folder, key)


def delete_all(project: Project) -> int:
    """Delete every one; returns the bytes that became free."""
    return cache.delete_all(project.folder)
