"""Base models seen from the app: what `model.base` may be, where it lies, whether it is complete. Downloads nothing."""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from studio.errors import ModelError
from studio.paths import atomic_write_json, folder_bytes, home, models_root, sha256_of

Kind = Literal["starter", "folder", "huggingface", "modelscope"]

MANIFEST_NAME = "retune_model.json"
MANIFEST_VERSION = 1
STARTER = "starter"
MODELSCOPE_PREFIX = "modelscope:"
ALLOWED = (
    "Allowed: `starter`; a Hugging Face id such as `owner/name`; `modelscope:owner/name`; "
    "or a model folder, written as an absolute path, with `~`, or relative to the folder that holds projects/."
)
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL_SUFFIXES = {".json", ".jinja", ".safetensors", ".bin", ".model", ".tiktoken", ".txt", ".py"}
# A tokenizer.json can be made of the others (studio.data.old_tokenizers).
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class BaseModel:
    """A base model as a config names it; `present` means that every file it needs is there."""

    kind: Kind
    id: str
    folder: Path
    present: bool


@dataclass(frozen=True)
class InstalledModel:
    """A complete model below models_root(); `name` is what `model.base` may say."""

    name: str
    folder: Path
    size_bytes: int
    kind: Kind


def resolve(base: str) -> BaseModel:
    """What a `model.base` string means, and where its files lie or would lie. Raises ModelError otherwise."""
    text = base.strip() if isinstance(base, str) else ""
    if text == STARTER:
        return _fetched("starter", STARTER, models_root() / STARTER)
    if text.startswith(MODELSCOPE_PREFIX):
        model_id = _checked_id(text.removeprefix(MODELSCOPE_PREFIX), base)
        return _fetched("modelscope", model_id, hub_folder("modelscope", model_id))
    if _looks_like_folder(text):
        folder = _local_folder(text)
        return BaseModel("folder", text, folder, not missing_parts(folder))
    model_id = _checked_id(text, base)
    return _fetched("huggingface", model_id, hub_folder("huggingface", model_id))


def require(base: str) -> Path:
    """The folder of a base model that is ready to load. Raises ModelError: what is missing, and how to get it."""
    model = resolve(base)
    if model.present:
        return model.folder
    if model.kind == "folder":
        raise ModelError(
            f"The folder {str(model.folder)!r} is not a complete model: {', '.join(missing_parts(model.folder))}.",
            "Give a folder in Hugging Face format, with config.json, a tokenizer and weights.",
        )
    raise ModelError(
        f"The base model {base.strip()!r} is not on this machine yet.",
        f"Get it with `retune models fetch {base.strip()}`, or with the button Get the model.",
    )


def list_models() -> list[InstalledModel]:
    """The complete models below models_root(), the starter first, then by name."""
    root = models_root()
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [model for folder in folders if (model := _installed(folder)) is not None]
    return sorted(found, key=lambda model: (model.kind != STARTER, model.name.lower()))


def hub_folder(kind: Kind, model_id: str) -> Path:
    """Where a hub's model lives. Ids cannot hold `--`, so two ids never share a folder."""
    owner, name = model_id.split("/")
    return models_root() / f"{kind}--{owner}--{name}"


def missing_parts(folder: Path) -> list[str]:
    """What a folder lacks to be a loadable model, in words; empty when nothing is missing."""
    if not folder.is_dir():
        return ["there is no such folder"]
    missing = [] if (folder / "config.json").is_file() else ["config.json is missing"]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append("tokenizer.json is missing")
    return missing + _missing_weights(folder)


def model_files(folder: Path) -> list[Path]:
    """The files that make up a model (weights, tokenizer, config, code), by name; READMEs and sub-folders are not."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix in MODEL_SUFFIXES and path.name != MANIFEST_NAME)


def write_manifest(folder: Path, kind: Kind, model_id: str, source: str) -> None:
    """Record every model file with its size and sha256. Written last: it is what makes a fetched folder complete."""
    files = {path.name: {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in model_files(folder)}
    manifest = {
        "version": MANIFEST_VERSION,
        "kind": kind,
        "id": model_id,
        "source": source,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    atomic_write_json(folder / MANIFEST_NAME, manifest)


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder that we fetched; None when there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def verify(folder: Path) -> list[str]:
    """Re-read every file of a fetched model and name those that changed since; empty when all are as fetched."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError(f"{str(folder)!r} has no {MANIFEST_NAME}, so there is nothing to compare it with.", ALLOWED)
    return [name for name, entry in manifest["files"].items() if not _same_file(folder / name, entry)]


def sha256_mismatches(folder: Path, expected: dict[str, str]) -> list[str]:
    """The names whose file has not the sha256 that was expected."""
    return [name for name, sha256 in expected.items() if sha256_of(folder / name) != sha256]


def model_fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and hashes of a model's files: equal for equal models, wherever they lie."""
    digest = hashlib.sha256()
    for name, size, sha256 in _file_hashes(folder):
        digest.update(f"{name}\0{size}\0{sha256}\n".encode())
    return digest.hexdigest()


def _checked_id(model_id: str, base: str) -> str:
    if not HUB_ID.fullmatch(model_id) or ".." in model_id or "--" in model_id:
        raise ModelError(f"{base!r} does not name a base model.", ALLOWED)
    return model_id


def _looks_like_folder(text: str) -> bool:
    if "\0" in text or not text or "://" in text:
        return False
    return Path(text).is_absolute() or text[0] in "~." or (home() / text).is_dir()


def _local_folder(text: str) -> Path:
    path = Path(text)
    if ".." in path.parts:
        raise ModelError(f"The model folder {text!r} goes up with `..`, which depends on where it is read.", ALLOWED)
    try:
        return (home() / path.expanduser()).resolve()
    except RuntimeError as error:
        raise ModelError(f"The model folder {text!r} cannot be found: {error}", ALLOWED) from error


def _fetched(kind: Kind, model_id: str, folder: Path) -> BaseModel:
    return BaseModel(kind, model_id, folder, is_complete(folder))


def is_complete(folder: Path) -> bool:
    """True when a fetched folder has its manifest and every file in it has the recorded size."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest["files"]:
        return False
    return all(_size(folder / name) == entry["size_bytes"] for name, entry in manifest["files"].items())


def _installed(folder: Path) -> InstalledModel | None:
    manifest = read_manifest(folder)
    if manifest is None or not is_complete(folder):
        return None
    prefix = MODELSCOPE_PREFIX if manifest["kind"] == "modelscope" else ""
    return InstalledModel(prefix + manifest["id"], folder, folder_bytes(folder), manifest["kind"])


def _missing_weights(folder: Path) -> list[str]:
    found = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        return ["weights are missing (model.safetensors, or model.safetensors.index.json and its parts)"]
    if not found.endswith(".index.json"):
        return []
    return [f"{name} is missing" for name in _shards(folder / found) if not (folder / name).is_file()]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"The list of weights {str(index)!r} cannot be read: {error!r}.", "Fetch the model again."
        ) from error


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _same_file(path: Path, entry: dict) -> bool:
    return _size(path) == entry["size_bytes"] and sha256_of(path) == entry["sha256"]


def _file_hashes(folder: Path) -> list[tuple[str, int, str]]:
    manifest = read_manifest(folder)
    if manifest is not None and is_complete(folder):
        return [(name, entry["size_bytes"], entry["sha256"]) for name, entry in sorted(manifest["files"].items())]
    return _cached_hashes(folder)


def _cached_hashes(folder: Path) -> list[tuple[str, int, str]]:
    """Hashes of a folder that is not ours to write into, remembered until a size or modification time changes."""
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    cache = models_root() / ".fingerprints" / f"{key}.json"
    known = _read_cache(cache)
    hashes = {path.name: _hash_entry(path, known.get(path.name)) for path in model_files(folder)}
    if hashes != known:
        atomic_write_json(cache, hashes)
    return [(name, entry["size_bytes"], entry["sha256"]) for name, entry in sorted(hashes.items())]


def _read_cache(cache: Path) -> dict:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hash_entry(path: Path, known: dict | None) -> dict:
    stat = path.stat()
    seen = {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if known and {key: known.get(key) for key in seen} == seen and "sha256" in known:
        return known
    return {**seen, "sha256": sha256_of(path)}
