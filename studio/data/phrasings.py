"""The sentence banks in banks/*.yaml, and the split of their phrasings into training and held-out probes."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

HELD_OUT_SHARE = 0.3
FEWEST_HELD_OUT = 4
_CONTRACTIONS = {"'s": " is", "'re": " are", "'m": " am", "'d": " would", "'ve": " have", "n't": " not"}
_COURTESY = re.compile(r"\bplease\b|请问|请|[啊呀呢哦嘛啦]")


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
