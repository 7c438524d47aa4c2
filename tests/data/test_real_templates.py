"""Trained tokens under the chat templates and tokenizers of twelve real families (fixtures/tokenizers)."""

import json
from functools import cache
from pathlib import Path

import pytest

from studio.data.conversation import Conversation, Message
from studio.data.draft import Draft
from studio.data.named import NamedTemplate
from studio.data.template import ChatTemplate
from studio.data.tokens import IGNORE_INDEX, TextTokenizer, encode_conversation, habits_of

FOLDER = Path(__file__).parent / "fixtures" / "tokenizers"
TRL = json.loads((FOLDER / "trl_masks.json").read_text(encoding="utf-8"))
FAMILIES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
WITHOUT_SYSTEM = ("gemma",)


@cache
def loaded(name: str) -> tuple[ChatTemplate, TextTokenizer]:
    return ChatTemplate.load(FOLDER / name), TextTokenizer.load(FOLDER / name)


def chat(row: str) -> Conversation:
    """The messages of a row of the fixtures; only "system" begins with a system message."""
    texts = TRL["rows"][row]
    system = [Message("system", texts[0])] if row == "system" else []
    turns = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts[len(system) :])]
    return Conversation((*system, *turns))


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in TRL["masks"].items() for row in rows])
def test_masks_are_those_of_trls_training_templates(name: str, row: str) -> None:
    golden = TRL["masks"][name][row]
    example = encode_conversation(chat(row), *loaded(name))
    # Llama 3's first template opens an answer at the end of any chat; TRL's does when asked.
    length = len(golden["input_ids"])
    assert example.input_ids[:length] == golden["input_ids"]
    assert [int(label != IGNORE_INDEX) for label in example.labels[:length]] == golden["mask"]
    assert set(example.labels[length:]) <= {IGNORE_INDEX}
    assert example.input_ids == golden["input_ids"] or name == "llama3"


# What is trained of the rows "zh" and "spaces", by hand: the answers as the template writes them, and their ends.
ENDS = {
    "qwen2_5": ("\n{}<|im_end|>\n", False),
    "internlm2": ("{}<|im_end|>", False),
    "chatglm3": ("\n {}", False),
    "baichuan2": ("{}", False),
    "yi": ("{}<|im_end|>", False),
    "gemma": ("{}<end_of_turn>\n", True),
    "llama2": (" {} </s>", True),
    "llama3": ("{}<|eot_id|>", True),
    "mistral_nemo": ("{}</s>", False),
    "deepseek_v3": ("<｜Assistant｜>{}<｜end▁of▁sentence｜>", False),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("row", ["zh", "spaces", "en"])
def test_answers_and_their_ends_are_trained_and_nothing_else(name: str, row: str) -> None:
    template, _ = loaded(name)
    words, trims = ENDS[name]
    answers = [message.content for message in chat(row).messages if message.role == "assistant"]
    expected = "".join(words.format(answer.strip() if trims else answer) for answer in answers)
    assert "".join(segment.text for segment in template.segments(chat(row).messages) if segment.trained) == expected


THINKING = {"qwen3": "<think>\n\n</think>\n\n", "minicpm_v4_5": "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("name", THINKING)
def test_templates_that_think_in_the_last_turn_only(name: str) -> None:
    template, _ = loaded(name)
    segments = template.segments(chat("zh").messages)
    trained = "".join(segment.text for segment in segments if segment.trained)
    assert trained.replace("\n我", "我").replace("<|im_end|>\n", "<|im_end|>") == (
        f"我是Luna，由Shane开发。<|im_end|>{THINKING[name]}东京😀。<|im_end|>"
    )


def test_every_family_is_looked_at() -> None:
    assert {*ENDS, *THINKING} == set(FAMILIES) and len(FAMILIES) == 12


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", TRL["rows"])
def test_tokens_and_text_agree(name: str, row: str) -> None:
    """One label per token, the text is the template's, and a prompt is the untrained beginning of its example."""
    if row == "system" and name in WITHOUT_SYSTEM:
        return
    template, tokenizer = loaded(name)
    whole, last = (encode_conversation(chat(row), template, tokenizer, loss_on=rule) for rule in ("all", "last"))
    assert whole.labels == whole.input_ids == last.input_ids and len(last.labels) == len(last.input_ids)
    assert whole.input_ids == tokenizer.encode(template.render(chat(row).messages))
    assert last.num_trained_tokens
    assert encode_conversation(chat(row), template, tokenizer).num_trained_tokens >= last.num_trained_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_what_looks_like_a_control_token_stays_text(name: str) -> None:
    template, tokenizer = loaded(name)
    for token in tokenizer.control_tokens:
        plain, attack = (
            encode_conversation(Conversation((Message("user", text), Message("assistant", "b"))), template, tokenizer)
            for text in ("x", f"x{token}x")
        )
        identity = tokenizer.token_id(token)
        assert attack.input_ids.count(identity) == plain.input_ids.count(identity)


def test_a_frame_is_widened_only_by_exactly_what_stands_there() -> None:
    draft = Draft(turns=[{"role": "assistant", "content": "a"}], wanted=[0], text="x\na\n\n", spans={0: (2, 3)})
    draft.widen("", "")
    draft.widen("y", "z")
    assert draft.spans == {0: (2, 3)}
    draft.widen("\n", "\n")
    assert draft.spans == {0: (1, 4)}


def test_templates_that_train_no_end_are_known() -> None:
    """ChatGLM3's and Baichuan2's own templates write nothing after an answer; the named ones of both do."""
    silent = {name for name in FAMILIES if not habits_of(loaded(name)[0], "assistant").trains_end}
    assert silent == {"chatglm3", "baichuan2"}
    assert habits_of(NamedTemplate.load("chatglm3", FOLDER / "chatglm3"), "assistant").trains_end
    assert not habits_of(loaded("chatglm3")[0], "all").trains_end


@pytest.mark.parametrize(
    ("name", "calls", "definitions"), [("qwen2_5", True, True), ("yi", False, False), ("internlm2", False, False)]
)
def test_templates_that_leave_tools_out_are_known(name: str, calls: bool, definitions: bool) -> None:
    habits = habits_of(loaded(name)[0], "assistant")
    assert (habits.writes_calls, habits.writes_tools) == (calls, definitions)
    assert not habits_of(NamedTemplate.load("qwen_chat", FOLDER / name), "assistant").writes_calls
