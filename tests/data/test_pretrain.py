"""Continued pretraining: every token of every document once and in order, EOS between, nothing longer than asked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.data.conversation import Conversation, Message
from studio.data.named import load_template
from studio.data.pretrain import document, sequences
from studio.data.segments import Segment
from studio.data.tokens import TextTokenizer, encode_conversation, encode_conversations
from studio.errors import DataError

TINY = Path(__file__).parent / "fixtures" / "xtuner" / "tokenizer"


def raw(text: str) -> Conversation:
    return Conversation((Message("assistant", text),), {"kind": "text"})


@given(documents=st.lists(st.lists(st.integers(0, 99), max_size=40), max_size=12), max_length=st.integers(1, 30))
def test_sequences_hold_every_token_once_and_in_order(documents: list[list[int]], max_length: int) -> None:
    found = list(sequences(documents, max_length))
    assert [token for sequence in found for token in sequence] == [token for each in documents for token in each]
    assert all(len(sequence) == max_length for sequence in found[:-1])
    assert all(0 < len(sequence) <= max_length for sequence in found)


@pytest.mark.parametrize("template", ["", "none", "qwen_chat", "minicpm"])
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_document_is_its_text_and_eos_whatever_the_template(template: str, loss_on: str) -> None:
    tokenizer = TextTokenizer.load(TINY)
    example = encode_conversation(raw("今天天气很好。\n"), load_template(template, TINY), tokenizer, 3, loss_on)
    assert tokenizer.decode(example.input_ids) == "今天天气很好。\n</s>"
    assert example.labels == example.input_ids and example.is_document and not example.truncated


def test_documents_among_chats_keep_their_place() -> None:
    tokenizer, template = TextTokenizer.load(TINY), load_template("default", TINY)
    chat = Conversation((Message("user", "q"), Message("assistant", "a")))
    rows = [raw("one"), chat, raw("two"), chat]
    found = list(encode_conversations(rows, template, tokenizer))
    assert found == [encode_conversation(row, template, tokenizer) for row in rows]
    assert [example.is_document for example in found] == [True, False, True, False]


def test_control_tokens_in_a_document_stay_text() -> None:
    tokenizer = TextTokenizer.load(TINY)
    example = encode_conversation(raw("a</s>b<|im_end|>"), load_template("", TINY), tokenizer)
    assert example.input_ids.count(2) == 1 and example.input_ids[-1] == 2 and 4 not in example.input_ids
    assert tokenizer.decode(example.input_ids) == "a</s>b<|im_end|></s>"
    assert document("a</s>", "</s>", ["</s>"]) == [
        Segment("a", True), Segment("</s>", True, literal=True), Segment("</s>", True, part=1)
    ]  # fmt: skip


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(DataError, match="needs the tokenizer's EOS"):
        document("text", "")
