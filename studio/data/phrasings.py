"""The sentence banks in banks/*.yaml: loading, splitting into training and held-out, filling slots."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, TypeVar

from ruamel.yaml import YAML

from studio.errors import DataError

HELD_OUT_SHARE = 0.3
FEWEST_HELD_OUT = 4
SLOT = re.compile(r"\{([a-z_]+[0-9]*)\}([.。]?)")
_CONTRACTIONS = {"'s": " is", "'re": " are", "'m": " am", "'d": " would", "'ve": " have", "n't": " not"}
_COURTESY = re.compile(r"\bplease\b|请问|请|[啊呀呢哦嘛啦]")

Values = dict[str, str]
First = TypeVar("First")
Second = TypeVar("Second")


@cache
def load_bank(name: str) -> dict[str, Any]:
    """The bank banks/<name>.yaml. Callers must not change what they get."""
    text = files("studio.data").joinpath("banks", f"{name}.yaml").read_text(encoding="utf-8")
    bank: dict[str, Any] = YAML(typ="safe").load(text)
    return bank


def normalise(text: str) -> str:
    """Equal for phrasings that differ only in case, punctuation, spaces, contractions or courtesy words."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    for short, long in _CONTRACTIONS.items():
        text = text.replace(short, long)
    words = re.sub(r"[\W_]+", " ", _COURTESY.sub(" ", text)).split()
    return " ".join(words)


def hold_out(
    phrasings: Sequence[str],
    share: float = HELD_OUT_SHARE,
    fewest: int = FEWEST_HELD_OUT,
    always_trained: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Split into (trained, held out), both in the bank's order.

    Held out are those with the smallest SHA-256 of their normalised text: no seed, number of rows or order in
    the bank changes which. `always_trained` are normalised phrasings that are never held out.
    """
    ranked = sorted(phrasings, key=lambda text: sha256(normalise(text).encode()).hexdigest())
    free = [text for text in ranked if normalise(text) not in always_trained]
    chosen = set(free[: max(fewest, round(share * len(phrasings)))])
    return [text for text in phrasings if text not in chosen], [text for text in phrasings if text in chosen]


def fill(form: str, values: Values) -> str:
    """Fill the slots in one pass, so that no value is read as a slot; DataError when a slot has no value."""

    def value_of(match: re.Match[str]) -> str:
        value = values.get(match[1], "")
        if not value:
            raise DataError(f"The sentence {form!r} has no value for {{{match[1]}}}.", "Fill that field in.")
        return value if value.endswith((".", "。")) else value + match[2]

    text = SLOT.sub(value_of, form)
    if left := SLOT.search(text):
        raise DataError(f"The placeholder {left[0]} is left in {text!r}.", "Take the braces out.")
    return text


def diagonals(first: Sequence[First], second: Sequence[Second]) -> list[tuple[First, Second]]:
    """All pairs, in an order that uses every item of `first` once before it uses any twice."""
    size = len(second)
    return [(item, second[(i + shift) % size]) for shift in range(size) for i, item in enumerate(first)]
