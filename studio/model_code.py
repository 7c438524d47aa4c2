"""Python code that a model folder brings: run only for a folder whose very files a person has consented to."""

import json
from pathlib import Path

from studio.errors import ModelError
from studio.paths import atomic_write_json, models_root, sha256_of

CONSENTS = ".trusted_code.json"


def code_files(folder: Path) -> dict[str, str]:
    """sha256 of every Python file in a model folder and below it, by its name relative to the folder."""
    folder = folder.resolve()
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.py"))}


def trust(folder: Path) -> dict[str, str]:
    """Consent to a folder's code as it is now; any change asks again. Raises ModelError when there is nothing to run.

    Code that the folder's config takes from another place cannot be consented to: it is not here to be looked at.
    """
    if elsewhere := code_elsewhere(folder):
        raise ModelError(
            f"{folder.name!r} takes its code from another place ({elsewhere}).", "Put the code into the folder itself."
        )
    files = code_files(folder)
    if not files:
        raise ModelError(f"{str(folder)!r} holds no Python code.", "There is nothing to consent to.")
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
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        mapped = values.get("auto_map") if isinstance(values, dict) else None
        found = json.dumps(mapped) if mapped else ""
        if "--" in found:
            return found[:120]
    return ""


def _consents() -> dict[str, dict[str, str]]:
    """What was consented to, by folder; a list that cannot be read counts as none."""
    try:
        values = json.loads((models_root() / CONSENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
