"""What the rooms below say, in the reader's language. They write English and know nothing of languages.

locales/<language>/told.yaml has sentences by their English templates. A message is taken apart by the template that it
was made from, and put together again in the other language. One without a template stays as it is.
"""

import re
from functools import lru_cache

from ruamel.yaml import YAML

from studio.ui.i18n import LOCALES, language

LONGEST = 4_000
SLOT = re.compile(r"\{\d\}")
LISTED = re.compile(r"(\s*- )(.+)")
NAMED = re.compile(r"([^:\n]{1,80}?, |[a-z_]+(?:\.[a-z_]+)*: )(.+)")
"""What a message is about stands before it: a dataset, or a setting."""
SENTENCE_END = re.compile(r"(?<=[.。]) ")
HINT_BEGINS = re.compile(r"(?<=[.。]) | (?=[A-Z`])")
"""Behind a message that ends in what a library said there may be no full stop."""


def told(message: str) -> str:
    """A message, or each line of it, in the reader's language."""
    return _told(message, language())


@lru_cache(maxsize=4096)
def _told(message: str, tongue: str) -> str:
    if len(message) > LONGEST or not _templates(tongue):
        return message
    if listed := LISTED.fullmatch(message):
        return listed[1] + _told(listed[2], tongue)
    if (meaning := _meaning(message, tongue)) is not None:
        return meaning
    if "\n" in message:
        return "\n".join(_told(line, tongue) for line in message.split("\n"))
    named = NAMED.fullmatch(message)
    if named and (meaning := _meaning(named[2], tongue)) is not None:
        return named[1] + meaning
    return _in_part(message, tongue)


def _meaning(message: str, tongue: str) -> str | None:
    return _as_sentences(message, tongue) or _known(message, tongue)


def _known(message: str, tongue: str) -> str | None:
    """What a template makes of it; None without one."""
    for words, pattern, meaning in _templates(tongue):
        if all(each in message for each in words) and (found := pattern.fullmatch(message)):
            return meaning.format(*(_told(part, tongue) for part in found.groups()))
    return None


@lru_cache(maxsize=4096)
def _as_sentences(message: str, tongue: str) -> str | None:
    """A message and its hint, which a job keeps as one text: known sentences one after the other."""
    for end in HINT_BEGINS.finditer(message):
        first = _known(message[: end.start()], tongue)
        rest = message[end.end() :]
        if first is not None and (others := _known(rest, tongue) or _as_sentences(rest, tongue)):
            return first + ("" if first[-1:] in ".。：" else "。") + others
    return None


def _in_part(message: str, tongue: str) -> str:
    """What is known at the beginning or the end of a message: what a library said stays, what to try is told."""
    for end in SENTENCE_END.finditer(message):
        first, rest = message[: end.start()], message[end.end() :]
        if (known := _known(first, tongue)) is not None:
            return f"{known} {_told(rest, tongue)}"
        if (known := _known(rest, tongue) or _as_sentences(rest, tongue)) is not None:
            return f"{first} {known}"
    return message


@lru_cache(maxsize=4)
def _templates(tongue: str) -> list[tuple[list[str], re.Pattern[str], str]]:
    """(its own words, pattern, meaning) of each. Those that begin with a word come first, then those with the most
    words: the others might take a part of them for a filling."""
    path = LOCALES / tongue / "told.yaml"
    sentences: dict[str, str] = YAML(typ="safe").load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ordered = sorted(sentences.items(), key=lambda pair: (pair[0].startswith("{"), -len(SLOT.sub("", pair[0]))))
    return [(SLOT.split(english), _pattern(english), meaning) for english, meaning in ordered]


def _pattern(english: str) -> re.Pattern[str]:
    """Fillings in their order; they stand on one line."""
    return re.compile("(.*?)".join(map(re.escape, SLOT.split(english))))
