"""An XTuner config as one of ours: read without running it, converted, and what was not taken over listed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.config.schema import RunConfig, parse_config
from studio.config.xtuner.mapping import mapped
from studio.config.xtuner.reading import Reading, Unread, read_file, read_text, require_finite
from studio.config.xtuner.terms import Converted, convert
from studio.config.yaml import commented_text
from studio.errors import ConfigError, Problem

OWN_NAME = "retune"  # the name under which our export keeps what XTuner has no word for
MAX_PLAIN = 10_000


@dataclass(frozen=True)
class Imported:
    """`notes` say what is otherwise here, `unread` what was not taken over, with lines."""

    config: RunConfig
    source: str
    notes: tuple[str, ...]
    unread: tuple[str, ...]
    converted: Converted

    @property
    def text(self) -> str:
        """The config as YAML; behind a value stands what was converted."""
        header = [f"{self.config.name}: imported from {self.source}. Behind a value stands what was converted."]
        header += [f"Otherwise: {note}." for note in self.notes]
        header += [f"NOT TAKEN OVER: {each}" for each in self.unread]
        return commented_text(
            self.converted.values, self.converted.remarks, [" ".join(line.split()) for line in header]
        )  # fmt: skip


def import_file(path: Path) -> Imported:
    """Read an XTuner config, written or dumped. Raises ConfigError where no run can be made of it."""
    return _imported(read_file(path), path.name, config_name(path.stem))


def config_name(text: str) -> str:
    """A config's name for a file's: lower-case letters, digits, - and _, 64 at most."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:64].rstrip("-_") or "imported"


def import_text(text: str, name: str = "imported") -> Imported:
    """As `import_file` for a text that stands alone; `name` becomes the config's."""
    return _imported(read_text(text, f"{name}.py"), f"{name}.py", name)


def import_bytes(content: bytes, file_name: str) -> Imported:
    """As `import_text` for the bytes of an uploaded file. Raises ConfigError."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("(file)", f"cannot be read: {error}")], file_name) from None
    return _imported(read_text(text, file_name), file_name, config_name(Path(file_name).stem))


def _imported(reading: Reading, source: str, name: str) -> Imported:
    require_finite(reading.names, source)
    found = mapped(reading, source)
    converted = convert(name, found.terms)
    _apply_own(converted, reading.names.get(OWN_NAME), source)
    config = parse_config(converted.values, source)
    return Imported(config, source, tuple(found.notes), tuple(found.unread), converted)


def _apply_own(converted: Converted, own: Any, source: str) -> None:
    """Settings that our own export wrote beside XTuner's: {"train.beta1": 0.9}."""
    if own is None:
        return
    if not isinstance(own, dict) or not all(isinstance(path, str) for path in own):
        raise ConfigError([Problem(OWN_NAME, "holds no settings by path")], source)
    budget = [MAX_PLAIN]
    for path, value in own.items():
        *parents, key = path.split(".")
        target: Any = converted.values
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise ConfigError([Problem(path, "is not a setting")], source)
        target[key] = _plain(value, path, source, budget)
        converted.remarks.pop(path, None)


def _plain(value: Any, path: str, source: str, budget: list[int]) -> Any:
    """The same of plain containers and scalars; counted, for what is shared may stand for more than there is."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ConfigError([Problem(path, "holds more values than a config has")], source)
    if isinstance(value, dict):
        return {str(key): _plain(each, path, source, budget) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, path, source, budget) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    reason = str(value) if isinstance(value, Unread) else "is no plain value"
    raise ConfigError([Problem(path, reason)], source)
