"""XTuner's work directory: a folder of links that shows a run's checkpoints where XTuner would have put them.

`iter_N.pth` counts micro-batches, as XTuner does; it leads to the run's `step_M.pth`, and M x accumulation is N.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from studio.errors import CheckpointError
from studio.paths import atomic_write_text, projects_root
from studio.projects import Project

LAST = "last_checkpoint"
PREFIX, SUFFIX = "iter_", ".pth"


@dataclass(frozen=True)
class Place:
    """A checkpoint of a run: its project's slug, the run's id, and its file's name."""

    project: str
    run_id: str
    name: str


def show_run(project: Project, run_id: str, folder: Path, micro_batches: int, config: Path | None = None) -> list[Path]:
    """Fill a work directory with links to the run's checkpoints, newest last, and return these.

    Links to what is gone are taken away; what else lies there is not touched. `config` is copied beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _drop_dead_links(folder)
    found = sorted(project.path("runs", run_id).glob(f"step_*{SUFFIX}"), key=_step_of)
    links = [_link(path, folder / f"{PREFIX}{_step_of(path) * micro_batches}{SUFFIX}") for path in found]
    if links:
        atomic_write_text(folder / LAST, str(links[-1]))
    if config and config.is_file() and config.resolve().parent != folder.resolve():
        shutil.copyfile(config, folder / config.name)
    return links


def place_of(path: Path) -> Place | None:
    """The run that a checkpoint belongs to, through links; None for a file of somebody else."""
    try:
        parts = path.resolve().relative_to(projects_root().resolve()).parts
    except ValueError:
        return None
    return Place(parts[0], parts[2], parts[3]) if len(parts) == 4 and parts[1] == "runs" else None


def newest(folder: Path) -> Path:
    """The checkpoint that a work directory names as its last. Raises CheckpointError."""
    try:
        path = Path((folder / LAST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{str(folder)!r} has no {LAST}.", "Name the checkpoint.") from None
    if not path.exists():
        raise CheckpointError(f"The last checkpoint {str(path)!r} is not there.", "Name another one.")
    return path


def _step_of(path: Path) -> int:
    number = path.stem.removeprefix("step_")
    return int(number) if number.isdigit() else 0


def _link(target: Path, link: Path) -> Path:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise CheckpointError(f"{str(link)!r} is there and no link of ours.", "Choose another --work-dir.")
    link.symlink_to(os.path.abspath(target), target_is_directory=target.is_dir())
    return link.absolute()


def _drop_dead_links(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        if path.is_symlink() and not path.exists():
            path.unlink()
