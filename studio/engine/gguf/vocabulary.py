"""A model's tokenizer as llama.cpp keeps one: a list of tokens with their kinds, and the rules that join them.

llama.cpp has its own tokenizers in C++, one for each way of cutting text before bytes are joined, and a file names the
one it wants (`tokenizer.ggml.pre`). Which one that is, is read off the tokenizer's own rules here. Those of unknown
cut are refused: a near one would give other ids than the model was trained on, silently.
Source: llama.cpp's src/llama-vocab.cpp, and the Hugging Face tokenizers of the models that each name stands for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from studio.data.tokens import TextTokenizer
from studio.errors import ModelError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer cuts text -> llama.cpp's name for it. "digits" are single digits, "gpt2" the cut of GPT-2.
CUTS = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (WORDS + r"\p{N}" + REST,): "qwen2",
    (WORDS + r"\p{N}{1,3}" + REST,): "llama-bpe",
}
SPACE = "▁"
MISSING = "[PAD{}]"


@dataclass(frozen=True)
class Vocabulary:
    """`model` is gpt2 (bytes) or llama (SentencePiece). `merges` belong to the one, `scores` to the other."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool
    adds_bos: bool

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_space_prefix(self.adds_space)


def vocabulary_of(tokenizer: TextTokenizer, num_rows: int) -> Vocabulary:
    """The tokenizer of a model whose embedding has `num_rows` rows; rows without a token get a name nobody writes.

    Raises ModelError for a tokenizer that llama.cpp has no counterpart of.
    """
    rules = json.loads(tokenizer.to_json())
    model = rules["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its tokenizer is of the kind {model.get('type')!r}, and BPE can be written")
    merges = [" ".join(each) if isinstance(each, list) else each for each in model["merges"]]
    tokens, kinds = _tokens(rules, num_rows)
    begins = _adds_bos(rules)
    if model.get("byte_fallback"):
        scores = _scores(tokens, merges)
        return Vocabulary("llama", "default", tokens, kinds, [], scores, _prepends_space(rules), begins)
    if not merges:
        raise _unknown("its tokenizer joins nothing (it has no merges)")
    return Vocabulary("gpt2", _cut(rules), tokens, kinds, merges, [], False, begins)


def _tokens(rules: Mapping[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Texts and kinds by id."""
    found = {number: token for token, number in rules["model"]["vocab"].items()}
    added = {each["id"]: each for each in rules.get("added_tokens", ())}
    found |= {number: each["content"] for number, each in added.items()}
    unknown = rules["model"].get("unk_token")
    is_sentencepiece = bool(rules["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(num_rows):
        token = found.get(number)
        tokens.append(MISSING.format(number) if token is None else token)
        kinds.append(int(_kind(token, added.get(number), unknown, is_sentencepiece)))
    return tokens, kinds


def _kind(token: str | None, added: Mapping[str, Any] | None, unknown: str | None, sentencepiece: bool) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if sentencepiece and token == unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    is_byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins the pair whose result scores highest, where BPE takes the earliest merge: the same order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(rules: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that was not written, as SentencePiece has it."""
    steps = _steps(rules.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in steps):
        return True
    cuts = _steps(rules.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in cuts)


def _cut(rules: Mapping[str, Any]) -> str:
    steps = _steps(rules.get("pre_tokenizer"), "pretokenizers")
    found = tuple(filter(None, (_cut_of(step) for step in steps)))
    if found not in CUTS or rules.get("normalizer") not in (None, {"type": "NFC"}):
        raise _unknown("its tokenizer cuts text in a way that llama.cpp has no name for")
    return CUTS[found]


def _cut_of(step: Mapping[str, Any]) -> str:
    """What a step of the pre-tokenizer does to text; empty for one that only maps bytes to letters."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2" if step.get("use_regex", True) else ""
    if step["type"] == "Split" and step["behavior"] == "Isolated":
        return str(step["pattern"].get("Regex", ""))
    return f"unknown: {step['type']}"


def _adds_bos(rules: Mapping[str, Any]) -> bool:
    """Whether a text on its own is begun with BOS."""
    for step in _steps(rules.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and step["single"]:
            return "SpecialToken" in step["single"][0]
    return False


def _steps(rule: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if rule is None:
        return []
    return list(rule[inner]) if rule["type"] == "Sequence" else [rule]


def _unknown(reason: str) -> ModelError:
    return ModelError(
        f"This model cannot be written as GGUF: {reason}.",
        "Merge it instead, and convert the folder with llama.cpp's own convert_hf_to_gguf.py.",
    )
