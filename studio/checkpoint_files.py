"""Is a checkpoint still what was saved? Size at a glance, sha256 on request, against the manifest beside it.

A checkpoint is a file, or a folder of files as DeepSpeed writes it; `step_N.manifest.json` stands beside either.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.errors import CheckpointError
from studio.paths import sha256_of

Progress = Callable[[int], None]
STATE_FILE = "retune_state.pth"  # in a folder: what a single file holds, but for weights and optimizer


def measure(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """What a manifest says of a file: size_bytes and sha256; of a folder also `files`, the same for each by its name.

    A folder's sha256 is that of its list of files. Every byte is read; `progress` gets the bytes read so far.
    """
    if not path.is_dir():
        return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path, progress)}
    files: dict[str, dict[str, Any]] = {}
    num_bytes = 0
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        before = num_bytes
        files[file.relative_to(path).as_posix()] = measure(file, _shifted(progress, before))
        num_bytes += file.stat().st_size
    listing = json.dumps(files, sort_keys=True).encode()
    return {"size_bytes": num_bytes, "sha256": hashlib.sha256(listing).hexdigest(), "files": files}


def glance(path: Path) -> str:
    """What a look at names and sizes finds wrong, in English; empty when nothing is."""
    if not path.exists():
        return "the file is gone"
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return error.message
    if path.is_dir():
        return _glance_into(path, manifest.get("files"))
    if path.stat().st_size != manifest["size_bytes"]:
        return f"it has {path.stat().st_size} bytes, its manifest says {manifest['size_bytes']}"
    return ""


def verify(path: Path, progress: Progress | None = None) -> str:
    """As `glance`, and every byte is read: one flipped bit is found. `progress` gets the bytes read so far."""
    if found := glance(path):
        return found
    measured, manifest = measure(path, progress), read_manifest(path)
    if measured["sha256"] != manifest["sha256"] or measured.get("files") != manifest.get("files"):
        return "its content is not what was saved: the sha256 differs from its manifest"
    return ""


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".manifest.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError when there is none that can be read."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: saving was interrupted", "Use the checkpoint before it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest cannot be read: {error}", "Use the checkpoint before it.") from error
    if not isinstance(manifest, dict) or not {"size_bytes", "sha256"} <= manifest.keys():
        raise CheckpointError("its manifest lacks size or sha256", "Use the checkpoint before it.")
    return manifest


def _glance_into(folder: Path, files: Any) -> str:
    if not isinstance(files, dict):
        return "its manifest is that of a file, and it is a folder"
    there = {each.relative_to(folder).as_posix(): each for each in folder.rglob("*") if each.is_file()}
    if odd := sorted(set(there) ^ set(files)):
        return f"{odd[0]} is {'missing' if odd[0] in files else 'not in its manifest'}"
    for name, file in there.items():
        wanted = files[name].get("size_bytes") if isinstance(files[name], dict) else None
        if file.stat().st_size != wanted:
            return f"{name} has {file.stat().st_size} bytes, its manifest says {wanted}"
    return ""


def _shifted(progress: Progress | None, by: int) -> Progress | None:
    return (lambda done: progress(by + done)) if progress else None
