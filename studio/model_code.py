"""Python code that a model folder brings: run only for a folder whose very files a person has consented to."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from studio.errors import ModelError
from studio.paths import atomic_write_json, models_root, sha256_of

CONSENTS = ".trusted_code.json"
COMPUTED_HERE = ("internlm", "internlm2", "qwen", "Yi")
"""Kinds that came with code and are computed without it (engine.models.families), and the Baichuans of 7B."""
MAX_SHOWN = 200_000  # characters of a file

Need = Literal["no", "wanted", "changed", "given", "elsewhere"]


def need(folder: Path) -> Need:
    """Whether a complete model folder can only be computed by code that it brings, and how its consent stands.

    "no": it brings none, or its kind is computed without. "wanted": nobody consented yet. "changed": to other files
    than are there now. "given": to these. "elsewhere": the code is not in the folder, and cannot be consented to.
    """
    if is_trusted(folder):
        return "given"
    if has_changed(folder):
        return "changed"
    if _is_computed_without(folder):
        return "no"
    if code_elsewhere(folder):
        return "elsewhere"
    return "wanted" if next(folder.rglob("*.py"), None) else "no"


def require_consent(folder: Path) -> None:
    """Raises ModelError for a folder whose model only code could compute that nobody consented to."""
    if need(folder) not in ("no", "given"):
        raise not_consented(folder)


def not_consented(folder: Path) -> ModelError:
    """The error for a model that cannot be loaded without its code."""
    message = f"The model {folder.name!r} needs Python code of its own, which is not run."
    if has_changed(folder):
        message = f"The model {folder.name!r} needs Python code of its own, which changed since it was consented to."
    return ModelError(
        message,
        "Look at it, and consent if you trust it: on the Config page, or with `retune models trust FOLDER`. Or choose "
        "a model whose architecture transformers has built in, or one of InternLM, InternLM2, Baichuan 7B and Qwen, "
        "which are computed without their code.",
    )


def source_of(folder: Path, name: str) -> str:
    """The text of one of `code_files`, for a person to read; the beginning of a very long one. Raises ModelError."""
    if name not in (files := code_files(folder)):
        raise ModelError(f"{folder.name!r} has no Python file {name!r}.", f"Allowed: {', '.join(files) or 'none'}.")
    return (folder.resolve() / name).read_text(encoding="utf-8", errors="replace")[:MAX_SHOWN]


def _is_computed_without(folder: Path) -> bool:
    """Whether transformers has the folder's kind of model built in, or the studio computes it as one that it has."""
    values = _settings(folder / "config.json")
    kind = str(values.get("model_type") or "")
    if not values.get("auto_map") or kind in COMPUTED_HERE:
        return True
    return _is_built_in(kind) or (kind == "baichuan" and "max_position_embeddings" in values)


def _is_built_in(kind: str) -> bool:
    """Whether transformers has a folder for such models; it is looked for and not imported."""
    package = find_spec("transformers")
    places = package.submodule_search_locations if package else None
    return bool(places and kind.isidentifier() and Path(places[0], "models", kind).is_dir())


def code_files(folder: Path) -> dict[str, str]:
    """sha256 of every Python file in a model folder and below it, by its name relative to the folder."""
    folder = folder.resolve()
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.py"))}


def trust(folder: Path, seen: dict[str, str] | None = None) -> dict[str, str]:
    """Consent to a folder's code as it is now; any change asks again. Raises ModelError when there is nothing to run,
    or when the files are not those that were `seen` (as `code_files` gave them).

    Code that the folder's config takes from another place cannot be consented to: it is not here to be looked at.
    """
    if elsewhere := code_elsewhere(folder):
        raise ModelError(
            f"{folder.name!r} takes its code from another place ({elsewhere}).", "Put the code into the folder itself."
        )
    files = code_files(folder)
    if not files:
        raise ModelError(f"{str(folder)!r} holds no Python code.", "There is nothing to consent to.")
    if seen is not None and seen != files:
        raise ModelError(f"The code in {folder.name!r} changed while it was looked at.", "Look at it again.")
    atomic_write_json(models_root() / CONSENTS, _consents() | {str(folder.resolve()): files})
    return files


def distrust(folder: Path) -> None:
    """Take consent back."""
    left = {place: files for place, files in _consents().items() if place != str(folder.resolve())}
    atomic_write_json(models_root() / CONSENTS, left)


def is_trusted(folder: Path) -> bool:
    """Whether a person has consented to exactly the code that is in the folder now."""
    consent = _consents().get(str(folder.resolve()))
    return bool(consent) and consent == code_files(folder) and not code_elsewhere(folder)


def has_changed(folder: Path) -> bool:
    """Whether there was consent to other code than is there now."""
    return str(folder.resolve()) in _consents() and not is_trusted(folder)


def code_elsewhere(folder: Path) -> str:
    """The first class that the folder's configs take from another repository; empty when none is."""
    for name in ("config.json", "tokenizer_config.json"):
        mapped = _settings(folder / name).get("auto_map")
        found = json.dumps(mapped) if mapped else ""
        if "--" in found:
            return found[:120]
    return ""


def _consents() -> dict[str, dict[str, str]]:
    """What was consented to, by folder; a list that cannot be read counts as none."""
    return _settings(models_root() / CONSENTS)


def _settings(path: Path) -> dict:
    """A JSON file of settings; one that is not there or cannot be read has none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
