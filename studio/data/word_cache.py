"""Ids of words that were seen before: most words of a dataset come again, and looking one up is ten times as fast.

A text is cut before single spaces between visible ASCII characters. Only tokenizers that are known to begin a token
at every such space are taken, so the ids are those of the whole text; others never come here (`WordCache.fits`).
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

from tokenizers import Tokenizer

MAX_WORDS = 1 << 17
LONGEST_WORD = 40
CUT = re.compile("(?<=[!-~]) (?=[!-~])")
WORD = re.compile("[!-~](?:[^ ]*[!-~])?")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
# Patterns of pre-tokenizers in which only the first character of a match can be a space that stands alone, so a match
# begins at it: those of Qwen and MiniCPM, Llama 3, DeepSeek-V3 (three, one after the other), Mistral's Tekken, GPT-4o.
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = frozenset({
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}",
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}",
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" "\r\n" r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n" r"]*|\s*[" "\r\n" r"]+|\s+(?!\S)|\s+",
    _CASED % ("", "", ""),
    _CASED % (f"{_SHORT}?", f"{_SHORT}?", "{1,3}"),
})  # fmt: skip

Encoded = tuple[list[int], list[int]]


class WordCache:
    """The ids of texts by a tokenizer that `fits`; remembers at most MAX_WORDS words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether every text's ids are those of its pieces, cut at CUT, one after the other."""
        if type(tokenizer.model).__name__ != "BPE" or tokenizer.model.dropout:
            return False
        added = tokenizer.get_added_tokens_decoder().values()
        if any(each.lstrip or each.rstrip or each.single_word for each in added):
            return False
        if any(map(str.isspace, "".join(each.content for each in added))):
            return False
        normalizers, splitters = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
        if splitters:
            return all(step["type"] == "NFC" for step in normalizers) and all(map(_begins_at_space, splitters))
        replaced = [(step.get("pattern"), step.get("content")) for step in normalizers]
        words = [*tokenizer.get_vocab(with_added_tokens=False), *(each.content for each in added)]
        return replaced == [({"String": " "}, SPACE)] and not any(SPACE in word.lstrip(SPACE) for word in words)

    def encode(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Encoded]:
        """For each text its ids, and for each of its places (characters, ascending) the first token that begins there
        or later. Raises what the tokenizer raises for text with half a character."""
        if len(self._known) > MAX_WORDS:
            self._known = {}
        known = self._known  # another thread may begin a new one
        cut = [_Pieces(text, own, known) for text, own in zip(texts, places, strict=True)]
        # Where in the text a token stands is asked for few of them, and not keeping it is quicker.
        found = self._each_once((each.fresh for each in cut), self._tokenizer.encode_batch_fast)
        placed = self._each_once((each.placed for each in cut), self._tokenizer.encode_batch)
        for text, encoding in found.items():
            word = text[1:]
            if len(word) <= LONGEST_WORD and text[:1] == " " and WORD.fullmatch(word):
                known[word] = encoding.ids
        return [each.encoded(found, placed) for each in cut]

    def _each_once(self, pieces: Iterable[dict[int, str]], encode_batch: Callable[..., list[Any]]) -> dict[str, Any]:
        texts = list(dict.fromkeys(chain.from_iterable(each.values() for each in pieces)))
        return dict(zip(texts, encode_batch(texts, add_special_tokens=False), strict=True))


class _Pieces:
    """A text in pieces: ids of those that are known, and by their number those that must be encoded, each but the first
    with the space before it: `placed` with a place in them, `fresh` without. A known word is one that may stand alone.
    """

    __slots__ = ("_ids", "_places", "fresh", "placed")

    def __init__(self, text: str, places: Sequence[int], known: dict[str, list[int]]) -> None:
        words = text.split(" ")
        ids = list(map(known.get, words))
        missing = [piece for piece, own in enumerate(ids) if own is None]
        if not _cut_well(words, missing):
            words = CUT.split(text)
            ids = list(map(known.get, words))
            missing = [piece for piece, own in enumerate(ids) if own is None]
        self._ids = ids
        self._places = _inside(text, words, places)
        self.placed = {piece: f" {words[piece]}" if piece else words[0] for piece, _ in self._places}
        wanted = (piece for piece in (0, *missing) if piece not in self.placed)
        self.fresh = {piece: f" {words[piece]}" if piece else words[0] for piece in wanted}

    def encoded(self, found: dict[str, Any], placed: dict[str, Any]) -> Encoded:
        ids = self._ids
        for piece, text in self.fresh.items():
            ids[piece] = found[text].ids
        for piece, text in self.placed.items():
            ids[piece] = placed[text].ids
        ends = [
            sum(map(len, ids[:piece])) + first_token(placed[self.placed[piece]], place) for piece, place in self._places
        ]
        return list(chain.from_iterable(ids)), ends


def _cut_well(words: list[str], missing: list[int]) -> bool:
    """Whether every space between the words is one to cut at; words that are known have such a space on both sides."""
    last = len(words) - 1
    for piece in missing:
        word = words[piece]
        if (piece and not "!" <= word[:1] <= "~") or (piece < last and not "!" <= word[-1:] <= "~"):
            return False
    return True


def _inside(text: str, words: list[str], places: Sequence[int]) -> list[tuple[int, int]]:
    """For each place, a character of the text, its piece and where in it, the space before it counted."""
    if len(words) == text.count(" ") + 1:
        pieces = [text.count(" ", 0, place) for place in places]
        return [
            (piece, place - text.rfind(" ", 0, place) if piece else place)
            for piece, place in zip(pieces, places, strict=True)
        ]
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))  # of a piece, its space left out
    pieces = [bisect_right(starts, place) - 1 for place in places]
    return [
        (piece, place - starts[piece] + 1) if piece > 0 else (0, place)
        for piece, place in zip(pieces, places, strict=True)
    ]


def first_token(encoding: Any, position: int) -> int:
    """Index of the first token that begins at character `position` or later."""
    token = encoding.char_to_token(position)
    if token is None:  # a character that the tokenizer drops
        return bisect_left(list(accumulate((start for start, _ in encoding.offsets), max)), position)
    while token < len(encoding) and encoding.token_to_chars(token)[0] < position:
        token += 1
    return int(token)


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as its steps in terms of tokenizer.json; none for None."""
    pending = [json.loads(part.__getstate__())] if part is not None else []
    steps: list[dict[str, Any]] = []
    while pending:
        step = pending.pop(0)
        inner = step.get("normalizers", step.get("pretokenizers"))
        if inner is None:
            steps.append(step)
        else:
            pending = [*inner, *pending]
    return steps


def _begins_at_space(splitter: dict[str, Any]) -> bool:
    if splitter["type"] == "ByteLevel":
        return not splitter.get("add_prefix_space")
    if splitter["type"] == "Split":
        whole = splitter.get("behavior") == "Isolated" and not splitter.get("invert")
        return whole and splitter.get("pattern", {}).get("Regex") in PATTERNS
    return bool(splitter["type"] == "Digits")
