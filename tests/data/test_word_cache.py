"""Ids through the memory of words are those of the whole text, and labels change at the same token."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import FAMILIES, write_model_folder

from studio.data import word_cache
from studio.data.tokens import TextTokenizer
from studio.data.word_cache import WordCache, first_token

REAL = Path(__file__).parent / "fixtures" / "tokenizers"
FITTING = ("qwen2_5", "qwen3", "minicpm_v4_5", "llama3", "deepseek_v3", "mistral_nemo", "internlm2", "yi", "gemma")
NOT_FITTING = ("llama2", "baichuan2", "chatglm3")  # they put a space before every text
# Whatever stands beside a space, a line break, a digit or a control token.
PIECES = st.sampled_from([
    " ", "  ", " ", "\n", "\n\n", "\r\n", "\t", "\u3000", "\xa0", "\u2581", "\x1c", "the", "Luna", "don't", "I'm", "1",
    "2024", "3.5", ".", ",", "?!", "/", "/a", "-", "(", "'s", "你好", "，", "。", "é", "e\u0301", "\u0301", "😀", "a",
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "_", "ẞ", "І", "ー", "ا", "\u200b", "\u0085",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=24).map("".join)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_file(str(REAL / name / "tokenizer.json")) for name in (*FITTING, *NOT_FITTING)}


def test_which_tokenizers_may_be_cut_at_spaces(loaded: dict[str, Tokenizer]) -> None:
    assert {name for name, each in loaded.items() if WordCache.fits(each)} == set(FITTING)


@settings(deadline=None, max_examples=120)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), data=st.data())
@example(texts=["  a the", "a b c a b", "x a b y", " a b ", "a  b \n c"], data=None)
@pytest.mark.parametrize("name", FITTING)
def test_the_ids_are_those_of_the_whole_text(
    name: str, loaded: dict[str, Tokenizer], texts: list[str], data: st.DataObject | None
) -> None:
    tokenizer = loaded[name]
    words = WordCache(tokenizer)
    places = [list(range(len(text))) if data is None else _places(data, text) for text in texts]
    for _again in range(2):  # the second time from memory
        for text, own, (ids, ends) in zip(texts, places, words.encode(texts, places), strict=True):
            whole = tokenizer.encode(text, add_special_tokens=False)
            assert ids == whole.ids
            assert ends == [first_token(whole, place) for place in own]


def _places(data: st.DataObject, text: str) -> list[int]:
    found = data.draw(st.sets(st.integers(0, max(0, len(text) - 1)), max_size=3)) if text else set()
    return sorted(found)


def test_a_full_memory_begins_anew(loaded: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_WORDS", 2)
    words, whole = WordCache(loaded["qwen2_5"]), loaded["qwen2_5"]
    for text in ("one two three four", "two five six", "one six two"):
        [(ids, _)] = words.encode([text], [[]])
        assert ids == whole.encode(text, add_special_tokens=False).ids


def unusual(change: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "\u2581": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if change == "model":
        tokenizer.model = models.WordLevel({"a": 0}, unk_token="a")
    elif change == "dropout":
        tokenizer.model = models.BPE({"a": 0}, [], dropout=0.5)
    elif change == "token with a space":
        tokenizer.add_tokens(["New York"])
    elif change == "token that takes spaces":
        tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    elif change == "pattern":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(r"\w+ \w+", "isolated")
    elif change == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "normalizer":
        tokenizer.normalizer = normalizers.NFKC()
    elif change == "words across spaces":
        tokenizer.model = models.BPE({"a": 0, "\u2581": 1, "a\u2581": 2}, [("a", "\u2581")])
        tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizers.Replace(" ", "\u2581")
    return tokenizer


def test_a_plain_byte_level_tokenizer_fits() -> None:
    assert WordCache.fits(unusual("nothing"))


@pytest.mark.parametrize(
    "change",
    ["model", "dropout", "token with a space", "token that takes spaces", "pattern", "prefix space", "normalizer",
     "words across spaces"],
)  # fmt: skip
def test_others_are_encoded_whole(change: str) -> None:
    assert not WordCache.fits(unusual(change))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_goes_to_another_process_as_it_is(family: str, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_model_folder(tmp_path, family))
    other = TextTokenizer.from_json(tokenizer.to_json())
    assert other.fingerprint == tokenizer.fingerprint and other.control_tokens == tokenizer.control_tokens
