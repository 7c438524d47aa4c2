"""`python -m studio.ui.locales`: collect all words into the catalogues and compile them. `--check` only looks."""

import ast
import io
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from studio.config.catalog.recipes import RECIPES
from studio.config.schema import RunConfig, Section
from studio.paths import REPOSITORY, atomic_write_bytes
from studio.ui.forms import label_of
from studio.ui.i18n import DOMAIN, LANGUAGES, LOCALES

SOURCES = ("app.py", "pages", "studio/ui", "studio/cli", "studio/charts.py", "studio/report.py")
KEYWORDS = {"_": 1, "N_": 1, "ngettext": 2}  # function: how many of its arguments are words
FIXED_TIME = datetime(2026, 1, 1, tzinfo=UTC)  # a catalogue changes only when its words do
TRANSLATED = tuple(code for code in LANGUAGES if code != "en")


def collect() -> Catalog:
    """Every marked word of the sources, and every label and description of the config schema."""
    catalog = Catalog(project="Retune Studio", charset="utf-8", creation_date=FIXED_TIME)
    for file in _files():
        place = file.relative_to(REPOSITORY).as_posix()
        for message in marked_words(file.read_text(encoding="utf-8")):
            catalog.add(message, locations=[(place, None)], flags=_flags(message))
    for file in sorted((REPOSITORY / "studio" / "engine").rglob("*.py")):
        for message in phase_words(file.read_text(encoding="utf-8")):
            catalog.add(message, locations=[("studio/engine", None)])
    for message in schema_words(RunConfig):
        catalog.add(message, locations=[("studio/config/schema.py", None)])
    for recipe in RECIPES.values():
        catalog.add(recipe.about, locations=[("studio/config/catalog/recipes.py", None)])
    return catalog


def marked_words(source: str) -> Iterator[str | tuple[str, ...]]:
    """Arguments of `_`, `N_` and `ngettext`. Read from the syntax tree: in f-strings too, where babel does not look."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KEYWORDS:
            words = node.args[: KEYWORDS[node.func.id]]
            texts = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            if len(texts) == KEYWORDS[node.func.id]:
                yield texts[0] if len(texts) == 1 else tuple(texts)


def phase_words(source: str) -> Iterator[str]:
    """Phases and units that jobs report, as in `job.phase("asking the base model", 12, "prompts")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.strip("_") == "phase":
            for word in (
                *node.args[:1],
                *node.args[2:3],
                *(each.value for each in node.keywords if each.arg == "unit"),
            ):
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield word.value


def schema_words(section: type[Section]) -> Iterator[str]:
    """Labels, descriptions and section titles that the form shows."""
    for name, field in section.model_fields.items():
        yield label_of(name)
        if field.description:
            yield field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield (field.annotation.__doc__ or "").strip()
            yield from schema_words(field.annotation)


def updated(language: str, words: Catalog) -> Catalog:
    """The language's catalogue with today's words: new ones empty, vanished ones gone."""
    path = po_path(language)
    catalog = Catalog(locale=language, project="Retune Studio")
    if path.is_file():
        with open(path, "rb") as file:
            catalog = read_po(file, locale=language)
    catalog.update(words, no_fuzzy_matching=True)
    catalog.obsolete.clear()
    catalog.fuzzy = False
    catalog.creation_date = catalog.revision_date = FIXED_TIME
    return catalog


def files_of(catalog: Catalog) -> tuple[bytes, bytes]:
    """The catalogue as .po and .mo."""
    po, mo = io.BytesIO(), io.BytesIO()
    write_po(po, catalog, width=120, include_lineno=False, sort_output=True, ignore_obsolete=True)
    write_mo(mo, catalog)
    return po.getvalue(), mo.getvalue()


def untranslated(catalog: Catalog) -> list[str]:
    """Words without a translation."""
    return [_text(message) for message in catalog if message.id and not _complete(message.string)]


def po_path(language: str) -> Path:
    return LOCALES / language / "LC_MESSAGES" / f"{DOMAIN}.po"


def _files() -> Iterator[Path]:
    for source in SOURCES:
        path = REPOSITORY / source
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []


def _flags(message: Any) -> list[str]:
    return ["python-brace-format"] if "{" in str(message) else []


def _complete(string: str | tuple[str, ...]) -> bool:
    return all(string) if isinstance(string, tuple) else bool(string)


def _text(message: Any) -> str:
    return message.id[0] if isinstance(message.id, tuple) else message.id


def main(arguments: list[str]) -> int:
    """Write the catalogues, or with --check say whether they are up to date. 1 when words lack a translation."""
    words, missing = collect(), 0
    for language in TRANSLATED:
        catalog = updated(language, words)
        po, mo = files_of(catalog)
        path = po_path(language)
        if "--check" in arguments:
            current = path.read_bytes() == po and path.with_suffix(".mo").read_bytes() == mo
            print(f"{language}: {'up to date' if current else 'out of date, run `make locales`'}")
            missing += not current
        else:
            atomic_write_bytes(path, po)
            atomic_write_bytes(path.with_suffix(".mo"), mo)
        for text in untranslated(catalog):
            print(f"{language}: not translated: {text}")
            missing += 1
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
