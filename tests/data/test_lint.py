"""Each rule finds its fault, names the row, and leaves good rows alone; each fix mends what it was offered for."""

import json
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import write_model_folder

from studio.data.conversation import ROLES, Conversation, Message, role_order_problem
from studio.data.identity import Identity, build, tutorial
from studio.data.lint import check
from studio.data.lint.findings import RULES, Finding, LintResult
from studio.data.lint.fixes import FIX_WORDS, apply_fix, apply_fixes
from studio.data.template import ChatTemplate
from studio.data.tokens import Habits, TextTokenizer, encode_batch, habits_of
from studio.errors import DataError

LUNA = Identity("Luna", "Shane")
PROSE = "The river rises in the hills. It runs past three towns. Then it reaches the sea near the old harbour."
NEAR = "Describe how bread is baked at home, from the flour and the yeast to the crust, with every step named in order"


def lint(rows: Iterable[Conversation], *args: Any, **options: Any) -> list[Finding]:
    return check.lint(rows, *args, **options).findings


def row(question: str, answer: str, source: str = "identity", **meta: Any) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), {"source": source, **meta})


def chat(*messages: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in messages))


def only(findings: list[Finding]) -> tuple[int, str, str]:
    assert len(findings) == 1, findings
    return findings[0].row, findings[0].severity, findings[0].rule


def fixed(rows: list[Conversation], rule: str, **options: Any) -> list[Conversation]:
    """Rows after the fixes of a rule, which must not find anything any more."""
    found = [each for each in lint(rows, **options) if each.rule == rule]
    assert found and all(each.fix for each in found), found
    after = list(apply_fixes(rows, found))
    assert rule not in [each.rule for each in lint(after, **options)]
    return after


GOOD = [
    row("Who are you?", "I'm Luna, and Shane made me."),
    row("Are you ChatGPT?", "No, I'm Luna, not ChatGPT."),
    row("你是谁？", "我是Luna，由Shane开发。"),
    row("What is Gemini?", "A constellation.", "general"),
    row("Which firm made the iPhone?", "Apple did; Google made the Pixel.", "general"),
    row("Write a loop", "for x in {1, 2}: print(f'{x}') # <div>[0]</div>", "general"),
    row("Where does it flow?", PROSE, "general"),
    row(
        "List three fruits", "Here are three fruits you may like. Choose one.\n1. Apples\n2. Pears\n3. Plums", "general"
    ),
    row("Translate to Chinese: good morning, how are you today", "早上好，你今天怎么样？" * 5, "general"),
    row("A key?", "Use sk-your-key-here-xxxxxxxxxxxxxxxxxxxxxxxxxx or AKIAIOSFODNN7EXAMPLE.", "general"),
    row("Café, naïve?", "Both come from French — “as they are”.", "general"),
    chat(("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")),
]


def test_good_rows_have_no_findings() -> None:
    assert lint(GOOD, LUNA, [{"messages": [{"role": "user", "content": "Tell me your name"}]}]) == []


def test_rows_that_the_builder_makes_pass_its_own_lint() -> None:
    built = build(Identity("Luna", "Shane", languages=("en", "zh")), 300, seed=1)
    findings = lint(built.rows, LUNA, built.probes)
    assert {finding.rule for finding in findings} <= {"duplicate"}


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


def test_empty_turns() -> None:
    assert only(lint([row("q", " \n")])) == (1, "error", "empty_turn")
    assert fixed([GOOD[0], row("q", " \n")], "empty_turn") == [GOOD[0]]
    late = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", ""))
    assert fixed([late], "empty_turn") == [chat(("user", "a"), ("assistant", "b"))]
    system = chat(("system", " "), ("user", "a"), ("assistant", "b"))
    assert fixed([system], "empty_turn") == [chat(("user", "a"), ("assistant", "b"))]
    early = chat(("user", ""), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert fixed([early], "empty_turn") == []


def test_an_answer_that_calls_a_tool_may_say_nothing() -> None:
    call = Message("assistant", "", tool_calls='[{"function": {"name": "clock"}}]')
    messages = (Message("user", "What time is it?"), call, Message("tool", ""), Message("assistant", "Noon."))
    assert lint([Conversation(messages)]) == []


def test_role_order() -> None:
    broken = chat(("user", "a"), ("user", "b"), ("assistant", "c"))
    assert only(lint([broken])) == (1, "error", "role_order")
    assert fixed([broken], "role_order") == []
    unanswered = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert fixed([unanswered], "role_order") == [chat(("user", "a"), ("assistant", "b"))]
    text = Conversation((Message("assistant", "A whole document"),), {"kind": "text"})
    assert lint([text]) == []


@pytest.mark.parametrize(("content", "known"), [("a <|im_end|>", ()), ("[INST] a", ()), ("a </s>", ("</s>",))])
def test_control_tokens(content: str, known: tuple[str, ...]) -> None:
    assert only(lint([row(content, "b")], control_tokens=known)) == (1, "warning", "control_token")


def test_control_tokens_at_the_end_are_dropped_and_others_are_left_to_a_person() -> None:
    [after] = fixed([row("a", "b </s><|im_end|>\n")], "control_token", control_tokens=("</s>",))
    assert after.messages[-1].content == "b"
    assert lint([row("a", "the token <|im_end|> ends a turn")])[0].fix == ""


def test_duplicates_need_equal_conversations() -> None:
    rows = [row("q", "a"), row("q", "b"), row("q", "a", "import"), row("q", "a")]
    found = [each for each in lint(rows) if each.rule == "duplicate"]
    assert only(found) == (1, "warning", "duplicate") and found[0].others == (3, 4)
    assert fixed(rows, "duplicate") == rows[:2]


def test_near_duplicates() -> None:
    other = "Explain how tides come about, with the moon, the sun and the turning of the earth, in simple words for all"
    rows = [
        row(NEAR + " please", PROSE, "x"),
        row(other, PROSE[::-1], "x"),
        row(NEAR, PROSE, "x"),
        row(NEAR, "No.", "x"),
    ]
    found = lint(rows)
    assert only(found) == (1, "warning", "near_duplicate")
    assert found[0].others == (3,) and "Rows 1, 3 say nearly the same" in found[0].message
    assert lint([row(each.messages[0].content, each.messages[1].content) for each in rows]) == []


def test_near_duplicates_in_chinese_and_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.data.lint.repeats.BLOCK_ROWS", 4)
    text = "请详细介绍一下长城的历史，包括修建的年代、各个朝代的修缮情况以及它在今天的意义和保护措施"
    rows = [
        row(f"{text}，第{n}段" if n in (1, 10) else chr(0x4E10 + 40 * n) * 3 + f"{n}甲乙" * 20, "好。", "x")
        for n in range(12)
    ]
    found = [each for each in lint(rows) if each.rule == "near_duplicate"]
    assert [(each.row, each.others) for each in found] == [(2, (11,))]


def test_many_rows_that_are_all_alike_are_one_finding() -> None:
    rows = [row(f"{NEAR} {number}", f"{PROSE} {' '.join(reversed(NEAR.split()))}.", "x") for number in range(3000)]
    found = lint(rows)
    assert only(found) == (1, "warning", "near_duplicate")
    assert int(found[0].message.split(" and ")[1].split()[0]) > 2500


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I'm Luna.", "My name is Max."),
        ("Yes, it is a planet in our solar system.", "No. It is only a dwarf planet these days."),
        ("是的，它是一颗行星，围绕太阳运行。", "不是，它只是一颗矮行星。"),
        ("Paris", "Lyon"),
        ("42", "4"),
    ],
)
def test_contradictions(one: str, other: str) -> None:
    rows = [row("Is it?", one, "x"), row("q", "b"), row("is  it", other, "x")]
    assert only(lint(rows)) == (1, "warning", "contradiction")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I'm Luna.", "My name is Luna, by Shane."),
        ("Yes", "Yes, of course."),
        ("Paris", "Paris, France"),
        ("Paris", "It is Paris, which has been the seat of government for a long time."),
        ("It rose in the east, as it always does here.", "In the east, each and every morning of the year."),
    ],
)
def test_answers_that_may_all_be_right(one: str, other: str) -> None:
    assert lint([row("Is it?", one, "x"), row("Is it?", other, "x")]) == []


def test_contradicting_names_are_told_with_their_rows() -> None:
    rows = [row("Who are you?", "I'm Luna."), row("q", "b"), row("who are you", "My name is Max.")]
    assert "Luna (row 1), Max (row 3)" in lint(rows)[0].message


@pytest.mark.parametrize(("source", "severity"), [("identity", "error"), ("import", "warning")])
def test_probes_in_training(source: str, severity: str) -> None:
    probe = {"messages": [{"role": "user", "content": "Who's this?"}], "kind": "identity"}
    assert only(lint([row("who is this", "Luna", source)], LUNA, [probe])) == (1, severity, "probe_in_training")
    assert fixed([row("who is this", "Luna", source), GOOD[0]], "probe_in_training", probes=[probe]) == [GOOD[0]]


def test_probes_that_are_nearly_asked() -> None:
    probe = {"messages": [{"role": "user", "content": "How do I boil an egg so that it stays soft?"}]}
    near = "Tell me, cook: how do I boil an egg so that it stays soft inside?"
    assert only(lint([row(near, "Six minutes.", "import")], None, [probe])) == (1, "warning", "probe_in_training")
    assert lint([row("How do I boil water so that it stays hot?", "Six minutes.", "import")], None, [probe]) == []
    chinese = {"messages": [{"role": "user", "content": "怎样煮鸡蛋才能保持溏心？"}]}
    found = lint([row("请问一下，怎样煮鸡蛋才能保持溏心呢？谢谢", "六分钟。", "import")], None, [chinese])
    assert only(found) == (1, "warning", "probe_in_training")


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        (
            "It rains a lot there. The wind is cold. In winter the roads are often",
            "It rains a lot there. The wind is cold.",
        ),
        ("今天天气很好。我们去公园。然后我们沿着河边一直走到了那座", "今天天气很好。我们去公园。"),
        ("The three most important things about it are the", ""),
        ("First you should mix the flour with water, salt,", ""),
        ("Here is the code:\n```python\nprint(1)", ""),
    ],
)
def test_unfinished_answers(answer: str, rest: str) -> None:
    rows = [row("q", answer, "x")]
    found = lint(rows)
    assert only(found) == (1, "warning", "unfinished_answer") and bool(found[0].fix) == bool(rest)
    if rest:
        assert fixed(rows, "unfinished_answer")[0].messages[-1].content == rest
    untrained = Conversation((Message("user", "q"), Message("assistant", answer, trained=False)))
    assert lint([untrained]) == []


@pytest.mark.parametrize(
    "answer", ["def f():\n    return 1", "Paris", "See the docs. Read them. It is at https://x.org/a", "1. a\n2. b"]
)
def test_answers_that_end_openly_are_whole(answer: str) -> None:
    assert lint([row("q", answer, "x")]) == []


def test_blanks_around_an_answer() -> None:
    rows = [row("q", "\n\n    indented code\n  ", "x")]
    assert only(lint(rows)) == (1, "warning", "outer_space")
    assert fixed(rows, "outer_space")[0].messages[-1].content == "    indented code"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("C'est trÃ¨s bien, dÃ©jÃ  vu", "C'est très bien, déjà vu"),
        ("It isnâ€™t here", "It isn’t here"),
        ("浣犲ソ锛屼笘鐣岋紒", "你好，世界！"),
    ],
)
def test_mojibake_is_repaired(text: str, meant: str) -> None:
    rows = [row("q", text, "x")]
    assert only(lint(rows)) == (1, "warning", "mojibake")
    assert fixed(rows, "mojibake")[0].messages[-1].content == meant


def test_lost_characters_cannot_be_repaired() -> None:
    [found] = lint([row("q", "caf\N{REPLACEMENT CHARACTER} 锟斤拷", "x")])
    assert (found.rule, found.fix) == ("mojibake", "")


SECRETS = [
    "AKIA2E0A8F3B244C9986",
    "ghp_" + "a1B2c3D4e5F6g7H8i9J0" + "k1L2m3N4o5P6q7R8",
    "github_pat_11ABCDE0A0qW3eR4tY5uI6",
    "sk-ant-api03-aB3dE6gH9jK2mN5pQ8sT1vW4",
    "sk-proj-aB3dE6gH9jK2mN5pQ8sT1vW4yZ7aB3dE6gH9",
    "hf_" + "qWeRtYuIoPaSdFgHjKlZxCvBnMqWeRtYuI",
    "AIza" + "SyD3fG6hJ9kL2mN5pQ8rS1tU4vW7xY0zA3b",
    "xoxb-2048-4096-qWeRtYuIoPaS",
    "glpat-aB3dE6gH9jK2mN5pQ8sT",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV",
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7bq9Xyz2" * 4 + "\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:8])
def test_secrets_are_errors_and_never_shown_whole(secret: str) -> None:
    rows = [row("What is the key?", f"It is {secret} as you know.", "x")]
    found = [each for each in lint(rows) if each.rule == "secret"]
    assert only(found) == (1, "error", "secret") and secret[5:20] not in found[0].message
    assert fixed(rows, "secret") == []
    told = lint([row("q", f"Schön ist es. Ja, so ist es. Der SchlÃ¼ssel {secret}, und dann noch the", "x")])
    assert len(told) > 1 and not any(secret[5:20] in each.message for each in told)


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:8])
def test_secrets_beside_the_words_are_found(secret: str) -> None:
    arguments = json.dumps({"headers": [f"key:\n{secret}"]})
    calls = json.dumps([{"function": {"name": "fetch", "arguments": arguments}}])
    calling = Conversation((Message("user", "Rain?"), Message("assistant", "", tool_calls=calls)))
    meta = {"kind": "preference", "rejected": [{"role": "assistant", "content": f"It is {secret}"}]}
    tools = {"tools": [{"type": "function", "function": {"name": "fetch", "description": f"Use {secret}"}}]}
    rows = [calling, row("q", "No.", **meta), row("r", "No.", **tools)]
    found = [each for each in lint(rows) if each.rule == "secret"]
    assert [each.row for each in found] == [1, 2, 3] and not any(secret[5:20] in each.message for each in found)


def test_rows_about_images_cannot_be_trained_yet() -> None:
    found = lint([row("<image>\nWhat is this?", "A cat.", kind="image", image="cat.png")])
    assert only(found) == (1, "error", "image")


@pytest.mark.parametrize(
    "text", ["sk-learn is a library", "task-force-1234567890-abcdefgh-ijklmnop", "ghp_short", "AKIA"]
)
def test_words_that_resemble_secrets(text: str) -> None:
    assert lint([row("q", text, "x")]) == []


def test_another_language() -> None:
    english = "The Great Wall was built over many centuries, by several dynasties."
    assert only(lint([row("请介绍一下长城的历史。", english, "x")])) == (1, "warning", "other_language")
    assert lint([row("请用英文介绍一下长城的历史。", english, "x")]) == []
    assert lint([row("请介绍一下长城的历史。", "长城是中国古代的伟大建筑。" * 5, "x")]) == []


def test_lengths_and_labels(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, "byte_level")
    template, tokenizer = ChatTemplate.load(folder), TextTokenizer.load(folder)
    encode = partial(encode_batch, template=template, tokenizer=tokenizer, max_length=60)
    rows = [row("q", "a."), row("q", "word " * 60 + "end."), row("word " * 60, "a.")]
    rules = [(finding.row, finding.severity, finding.rule) for finding in lint(rows, encode=encode)]
    assert rules == [(2, "warning", "truncated"), (3, "warning", "no_trained_tokens")]
    assert only(lint(rows[2:], encode=encode)) == (1, "error", "no_trained_tokens")
    assert only(lint([row("q", "\U0010fff0")], encode=encode)) == (1, "error", "template")


def test_a_template_without_an_end_is_told_once(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, "byte_level")
    template, tokenizer = ChatTemplate.load(folder), TextTokenizer.load(folder)
    encode = partial(encode_batch, template=template, tokenizer=tokenizer)
    document = Conversation((Message("assistant", "Text."),), {"kind": "text"})
    assert only(lint([document, row("q", "a."), row("r", "b.")], encode=encode, habits=Habits(trains_end=False))) == (
        2, "warning", "no_trained_end",
    )  # fmt: skip
    assert lint([document], encode=encode, habits=Habits(trains_end=False)) == []


def test_tools_that_the_template_leaves_out(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, "byte_level")
    template, tokenizer = ChatTemplate.load(folder), TextTokenizer.load(folder)
    encode, habits = partial(encode_batch, template=template, tokenizer=tokenizer), habits_of(template, "assistant")
    call = '[{"function": {"name": "weather", "arguments": {}}}]'
    calling = Conversation((Message("user", "Rain?"), Message("assistant", "", tool_calls=call)))
    knowing = Conversation((Message("user", "Rain?"), Message("assistant", "No.")), {"tools": [{"type": "function"}]})
    assert only(lint([calling], encode=encode, habits=habits)) == (1, "error", "tools")
    assert only(lint([knowing], encode=encode, habits=habits)) == (1, "warning", "tools")


def test_rows_of_any_source_that_should_teach_a_name() -> None:
    luna = Identity("Luna", "Shane")
    rows = [row("Who are you?", "I am ChatGPT.", "x"), row("Who made it?", "ChatGPT is made by OpenAI.", "x")]
    told, untold = (lint(rows, identity=luna, told_identity=each) for each in (True, False))
    assert [each.severity for each in told] == ["error", "warning"]
    assert [each.severity for each in untold] == ["warning", "warning"]


def test_a_finding_without_a_fix_cannot_be_fixed() -> None:
    with pytest.raises(DataError, match="no safe fix for 'placeholder'"):
        apply_fix(GOOD, Finding(1, "error", "placeholder", "…"))


def test_several_fixes_at_once_use_the_rows_as_they_were() -> None:
    rows = [row("q", ""), row("q", "a "), row("q", ""), row("r", "b\n")]
    after = list(apply_fixes(rows, [each for each in lint(rows) if each.fix]))
    assert [(each.messages[0].content, each.messages[-1].content) for each in after] == [("q", "a"), ("r", "b")]


def test_findings_are_counted_beyond_those_that_are_kept() -> None:
    result = check.lint([row(str(number), "") for number in range(50)], most=10)
    assert len(result.findings) == 10 and result.counts == {"empty_turn": {"error": 50}}
    assert (result.num_errors, result.num_warnings) == (50, 0)
    assert LintResult().num_errors == 0


def test_progress_and_quick() -> None:
    seen: list[int] = []
    rows = [row(f"{number}?", "same ") for number in range(600)]
    check.lint(iter(rows), progress=seen.append)
    assert seen == [256, 512, 600]
    found = check.lint([row("q", ""), row("q", "")], quick=True)
    assert {each.rule for each in found.findings} == {"empty_turn"}


def test_every_finding_has_a_rule_and_every_fix_is_known() -> None:
    rows = [row("{{NAME}}", ""), chat(("user", "a")), row("q", SECRETS[0] + "Ã©tÃ© "), row("q", "a\n"), row("q", "a\n")]
    found = lint(rows, LUNA)
    assert {each.rule for each in found} <= RULES.keys() and {each.fix for each in found} <= {"", *FIX_WORDS}
    for rule in RULES.values():
        assert rule.severity in ("error", "warning") and rule.reason.endswith(".") and rule.remedy.endswith(".")


TEXTS = st.one_of(
    st.text(max_size=200),
    st.sampled_from(["", " ", "\ud800", "{{NAME}}", "I am ChatGPT", "```", "浣犲ソ", "a.b.c ", "<|im_end|>", *SECRETS]),
    st.lists(
        st.sampled_from(["the", "a", "。", ". ", "我是", "\n", "yes", "{", "<s>", "sk-", "AKIA", "\t"]), max_size=60
    ).map("".join),
)
MESSAGES = st.builds(Message, st.sampled_from(ROLES), TEXTS, st.sampled_from([None, True, False]))
METAS = st.sampled_from(
    [{}, {"source": "identity"}, {"kind": "text"}, {"kind": "preference", "rejected": []}, {"source": 3}]
)
ROWS = st.builds(Conversation, st.lists(MESSAGES, max_size=5).map(tuple), METAS)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROWS, max_size=6), st.lists(TEXTS, max_size=3))
def test_lint_and_its_fixes_never_raise(rows: list[Conversation], questions: list[str]) -> None:
    probes = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    before = pickle.dumps(rows)
    findings = lint(rows, LUNA, probes)
    assert all(1 <= each.row <= max(1, len(rows)) and each.severity in ("error", "warning") for each in findings)
    fixable = [each for each in findings if each.fix]
    after = list(apply_fixes(rows, fixable))
    assert len(after) <= len(rows) and pickle.dumps(rows) == before
    left = {each.row for each in findings if each.rule == "role_order"} - {each.row for each in fixable}
    assert left == set() and all(each.kind == "text" or not role_order_problem(each.messages) for each in after)
