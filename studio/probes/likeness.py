"""How alike two texts are, and whether one repeats itself; no model needed."""

import re
from difflib import SequenceMatcher

LONGEST_COMPARED = 2_000  # words; the comparison takes their number squared at worst
LOOP_WIDTH = 6
FEWEST_PIECES = 24
_WORDS = re.compile(r"[^\W_]+|[\u3400-\u9fff]")
_HAN = re.compile(r"([\u3400-\u9fff])")


def similarity(text: str, other: str) -> float:
    """1 for equal words in equal order, 0 for none in common; case and punctuation do not count.

    Gestalt pattern matching over words (Ratcliff and Metzener 1988), as Python's difflib computes it; a Chinese
    character counts as a word.
    """
    one, two = words_of(text)[:LONGEST_COMPARED], words_of(other)[:LONGEST_COMPARED]
    return SequenceMatcher(None, one, two, autojunk=False).ratio()


def words_of(text: str) -> list[str]:
    """Lower-case words; Chinese characters count as words."""
    return _WORDS.findall(_HAN.sub(r" \1 ", text.casefold()))


def loops(text: str) -> bool:
    """Whether the text says the same again and again: more than half of its six-letter pieces come twice."""
    pieces = [text[start : start + LOOP_WIDTH] for start in range(len(text) - LOOP_WIDTH + 1)]
    return len(pieces) > FEWEST_PIECES and len(set(pieces)) < 0.5 * len(pieces)
