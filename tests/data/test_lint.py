"""Each rule finds its fault, names the row, and leaves good rows alone."""

from pathlib import Path

import pytest
from tokenizers_for_tests import write_model_folder

from studio.data.formats import Conversation, Message
from studio.data.identity import Identity, build, tutorial
from studio.data.lint import Finding, has_errors, lint
from studio.data.template import ChatTemplate
from studio.data.tokens import Example, TextTokenizer, encode_conversation

LUNA = Identity("Luna", "Shane")


def row(question: str, answer: str, source: str = "identity") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), {"source": source})


def only(findings: list[Finding]) -> tuple[int, str, str]:
    assert len(findings) == 1, findings
    return findings[0].row, findings[0].severity, findings[0].rule


GOOD = [
    row("Who are you?", "I'm Luna, and Shane made me."),
    row("Are you ChatGPT?", "No, I'm Luna, not ChatGPT."),
    row("你是谁？", "我是Luna，由Shane开发。"),
    row("What is Gemini?", "A constellation.", "general"),
    row("Which firm made the iPhone?", "Apple did; Google made the Pixel.", "general"),
    row("Write a loop", "for x in {1, 2}: print(f'{x}') # <div>[0]</div>", "general"),
]


def test_good_rows_have_no_findings() -> None:
    assert lint(GOOD, LUNA, [{"messages": [{"role": "user", "content": "Tell me your name"}]}]) == []


def test_rows_that_the_builder_makes_pass_its_own_lint() -> None:
    built = build(Identity("Luna", "Shane", languages=("en", "zh")), 300, seed=1)
    errors = [finding for finding in lint(built.rows, LUNA, built.probes) if finding.severity == "error"]
    assert errors == []


def test_the_tutorials_repeats_are_grouped() -> None:
    findings = lint(tutorial(LUNA, 50), LUNA)
    duplicates = [finding for finding in findings if finding.rule == "duplicate"]
    assert len(duplicates) == len({finding.message for finding in duplicates}) <= 4
    assert "50 rows" in duplicates[0].message and "and 40 more" in duplicates[0].message


@pytest.mark.parametrize(
    ("answer", "source", "severity"),
    [
        ("I am {{NAME}}.", "import", "error"),
        ("I am {{ name }}.", "identity", "error"),
        ("I am <NAME>, Luna.", "identity", "error"),
        ("Luna by [Your Name]", "identity", "error"),
        ("Dear [Name], Luna", "general", "warning"),
        ("f'{name}' Luna", "general", "warning"),
    ],
)
def test_placeholders(answer: str, source: str, severity: str) -> None:
    assert only(lint([GOOD[0], row("q", answer, source)], LUNA)) == (2, severity, "placeholder")


@pytest.mark.parametrize(
    ("answer", "source", "severity"),
    [
        ("I am ChatGPT.", "identity", "error"),
        ("I was trained by OpenAI.", "identity", "error"),
        ("我是通义千问。", "identity", "error"),
        ("I am not ChatGPT.", "identity", "warning"),
        ("Yes. Qwen it is.", "identity", "warning"),
        ("I'm Claude, made by Anthropic.", "general", "warning"),
    ],
)
def test_rival_names(answer: str, source: str, severity: str) -> None:
    assert only(lint([row("q", answer, source)], LUNA)) == (1, severity, "rival_name")


def test_a_rival_that_is_the_identity_itself_is_no_rival() -> None:
    assert lint([row("q", "I come from OpenAI.")], Identity("Nova", "OpenAI")) == []
    assert lint([row("q", "I am Qwen.")]) == []


def test_bad_turns() -> None:
    assert only(lint([row("q", " \n")])) == (1, "error", "empty_turn")
    broken = Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    assert only(lint([broken])) == (1, "error", "role_order")


@pytest.mark.parametrize(("content", "known"), [("a <|im_end|>", ()), ("[INST] a", ()), ("a </s>", ("</s>",))])
def test_control_tokens(content: str, known: tuple[str, ...]) -> None:
    assert only(lint([row(content, "b")], control_tokens=known)) == (1, "warning", "control_token")


def test_duplicates_need_equal_conversations() -> None:
    assert only(lint([row("q", "a"), row("q", "b"), row("q", "a", "import")])) == (1, "warning", "duplicate")


def test_contradicting_names() -> None:
    rows = [row("Who are you?", "I'm Luna."), row("q", "b"), row("who are you", "My name is Max.")]
    found = lint(rows)
    assert only(found) == (1, "warning", "contradiction")
    assert "Luna (row 1), Max (row 3)" in found[0].message
    assert lint([row("Who are you?", "I'm Luna."), row("Who are you?", "My name is Luna, by Shane.")]) == []


@pytest.mark.parametrize(("source", "severity"), [("identity", "error"), ("import", "warning")])
def test_probes_in_training(source: str, severity: str) -> None:
    probe = {"messages": [{"role": "user", "content": "Who's this?"}], "kind": "identity"}
    assert only(lint([row("who is this", "Luna", source)], LUNA, [probe])) == (1, severity, "probe_in_training")


def test_lengths_and_labels(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, "byte_level")
    template, tokenizer = ChatTemplate.load(folder), TextTokenizer.load(folder)

    def encode(conversation: Conversation) -> Example:
        return encode_conversation(conversation, template, tokenizer, max_length=60)

    rows = [row("q", "a"), row("q", "word " * 60), row("word " * 60, "a")]
    rules = [(finding.row, finding.severity, finding.rule) for finding in lint(rows, encode=encode)]
    assert rules == [(2, "warning", "truncated"), (3, "warning", "no_trained_tokens")]
    assert only(lint(rows[2:], encode=encode)) == (1, "error", "no_trained_tokens")
    assert only(lint([row("q", "\U0010fff0")], encode=encode)) == (1, "error", "template")


def test_errors_block_and_warnings_do_not() -> None:
    assert has_errors(lint([row("q", "")]))
    assert not has_errors(lint([row("q", "a"), row("q", "a")]))
