"""General prompts, to keep what a model knows: half to train on with its own answers, half as probes.

About a third are near misses: worded like questions about the assistant, but about something else. There a
model that was tuned too hard says its own name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from studio.data.phrasings import hold_out, load_bank
from studio.errors import DataError

LANGUAGES = ("en", "zh")
CATEGORIES = ("near", "far")


@dataclass(frozen=True)
class Prompt:
    """A question about anything but the assistant; `category` is near or far."""

    text: str
    language: str
    category: str


@dataclass(frozen=True)
class GeneralPrompts:
    """The half to train on and the half to probe with; they share no prompt."""

    train: list[Prompt]
    held_out: list[Prompt]


def general_prompts(languages: Sequence[str] = LANGUAGES) -> GeneralPrompts:
    """All prompts in these languages, halved within each language and category; DataError for others."""
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown or not languages:
        raise DataError(f"The languages are {list(languages)}.", "Choose en, zh or both.")
    prompts = GeneralPrompts([], [])
    for language in (language for language in LANGUAGES if language in languages):
        for category in CATEGORIES:
            halves = hold_out(load_bank(f"general_{language}")[category], share=0.5)
            for half, texts in zip((prompts.train, prompts.held_out), halves, strict=True):
                half.extend(Prompt(text, language, category) for text in texts)
    return prompts
