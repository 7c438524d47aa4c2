"""Is a checkpoint's file still what was saved? Size at a glance, sha256 on request, against the manifest beside it."""

import json
from collections.abc import Callable
from pathlib import Path

from studio.errors import CheckpointError
from studio.paths import sha256_of


def glance(path: Path) -> str:
    """What a look at name and size finds wrong, in English; empty when nothing is."""
    if not path.exists():
        return "the file is gone"
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return error.message
    if path.is_file() and path.stat().st_size != manifest["size_bytes"]:
        return f"it has {path.stat().st_size} bytes, its manifest says {manifest['size_bytes']}"
    return ""


def verify(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """As `glance`, and every byte is read: one flipped bit is found. `progress` gets the bytes read so far."""
    if found := glance(path):
        return found
    if path.is_dir():
        return ""
    if sha256_of(path, progress) != read_manifest(path)["sha256"]:
        return "its content is not what was saved: the sha256 differs from its manifest"
    return ""


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".manifest.json")


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint. Raises CheckpointError when there is none that can be read."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: saving was interrupted", "Use the checkpoint before it.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its manifest cannot be read: {error}", "Use the checkpoint before it.") from error
    if not isinstance(manifest, dict) or not {"size_bytes", "sha256"} <= manifest.keys():
        raise CheckpointError("its manifest lacks size or sha256", "Use the checkpoint before it.")
    return manifest
