"""Tells the language of a text by its script alone."""

import re

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
LATIN = re.compile(r"[A-Za-z]")
LETTER = re.compile(r"[^\W\d_]")
# A Chinese character says about as much as four letters.
LETTERS_PER_HAN = 4
FEWEST_LETTERS = 2


def language_of(text: str) -> str:
    """ "zh" when most of the text is Chinese characters, "en" when most is plain Latin letters, else "other"."""
    latin = len(LATIN.findall(text))
    if text.isascii():
        return "en" if latin >= FEWEST_LETTERS else "other"
    han = len(HAN.findall(text))
    foreign = len(LETTER.findall(text)) - latin - han
    if LETTERS_PER_HAN * han > latin and han > foreign:
        return "zh" if not KANA_OR_HANGUL.search(text) else "other"
    # English borrows a few accented letters; French, German or Vietnamese use one in thirty at least.
    return "en" if latin >= FEWEST_LETTERS and foreign * 50 < latin else "other"
