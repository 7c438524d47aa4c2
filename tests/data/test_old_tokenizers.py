"""Tokenizers made of tokenizer.model and qwen.tiktoken: the ids of sentencepiece and tiktoken themselves.

The two models were trained by sentencepiece 0.2.3 on this project's own documents, the ranks by tokenizers; what
sentencepiece and tiktoken 0.14 make of some texts is in expected.json, as [text, ids, text again].
"""

import json
from pathlib import Path

import pytest

from studio.data.old_tokenizers import QWEN_SPECIAL, can_be_made, from_sentencepiece, from_tiktoken, made_tokenizer
from studio.data.tokens import TextTokenizer
from studio.errors import DataError
from studio.models import missing_parts

FOLDER = Path(__file__).parent / "fixtures/old_tokenizers"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_and_texts_are_those_of_the_original(name: str) -> None:
    if name == "qwen":
        tokenizer = from_tiktoken((FOLDER / "qwen.tiktoken").read_bytes())
    else:
        tokenizer = from_sentencepiece((FOLDER / f"{name}.model").read_bytes())
    assert len(EXPECTED[name]) >= 10
    for text, ids, again in EXPECTED[name]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == again


def folder_with(tmp_path: Path, name: str = "tokenizer.model", source: str = "bpe.model") -> Path:
    (tmp_path / name).write_bytes((FOLDER / source).read_bytes())
    return tmp_path


def test_a_folder_without_tokenizer_json_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    names = {"added_tokens_decoder": {"3": {"content": "<|im_start|>"}, "4": {"content": "<|im_end|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    assert can_be_made(folder) and not any("tokenizer" in part for part in missing_parts(folder))
    tokenizer = TextTokenizer.load(folder)
    assert tokenizer.token_id("<|im_start|>") == 3 and "<|im_end|>" in tokenizer.control_tokens
    assert tokenizer.encode("<|im_start|>x")[0] == 3
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    made = made_tokenizer(folder)
    before = made.stat().st_mtime_ns
    assert made_tokenizer(folder).stat().st_mtime_ns == before  # made once


def test_control_tokens_of_qwen_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(folder_with(tmp_path, "qwen.tiktoken", "qwen.tiktoken"))
    first = tokenizer.token_id("<|endoftext|>")
    assert [tokenizer.token_id(name) for name in QWEN_SPECIAL] == list(range(first, first + len(QWEN_SPECIAL)))


@pytest.mark.parametrize("kept", [0, 1, 50, 10_001])
def test_a_damaged_file_is_named(tmp_path: Path, kept: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes((FOLDER / "bpe.model").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        made_tokenizer(tmp_path)


def test_ranks_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\nnonsense\n")
    with pytest.raises(DataError, match="tiktoken"):
        made_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(DataError, match="no tokenizer.json"):
        made_tokenizer(tmp_path)
