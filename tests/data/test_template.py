"""Templates render as they should, say which text is trained, and cannot hang, flood or leave the sandbox."""

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from studio.data.formats import Conversation, Message
from studio.data.render_worker import WORKER
from studio.data.segments import Segment
from studio.data.template import ChatTemplate
from studio.errors import DataError

CHATML = ChatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO_TURNS = [
    Message("system", "Be kind."),
    Message("user", "Who are you?"),
    Message("assistant", "Luna."),
    Message("user", "Thanks."),
    Message("assistant", "Welcome."),
]
# Shows a thought before the last answer only, as reasoning models do.
LAST_TURN_DIFFERS = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}[think]{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.trained]


def test_chatml_text() -> None:
    assert CHATML.render(TWO_TURNS[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_may_be_plain_rows() -> None:
    assert CHATML.render([message.to_row() for message in TWO_TURNS]) == CHATML.render(TWO_TURNS)


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", ["Luna.<|im_end|>", "Welcome.<|im_end|>"]),
        ("last", ["Welcome.<|im_end|>"]),
        ("all", [CHATML.render(TWO_TURNS)]),
    ],
)
def test_what_is_trained(loss_on: str, expected: list[str]) -> None:
    segments = CHATML.segments(TWO_TURNS, loss_on)
    assert "".join(segment.text for segment in segments) == CHATML.render(TWO_TURNS)
    assert trained(segments) == expected


def test_a_message_overrides_what_is_trained() -> None:
    off = [*TWO_TURNS[:2], Message("assistant", "Luna.", trained=False), *TWO_TURNS[3:]]
    assert trained(CHATML.segments(off)) == ["Welcome.<|im_end|>"]
    on = [TWO_TURNS[0], Message("user", "Who are you?", trained=True), *TWO_TURNS[2:]]
    assert trained(CHATML.segments(on)) == ["Who are you?", "Luna.<|im_end|>", "Welcome.<|im_end|>"]
    assert "".join(trained(CHATML.segments(off, "all"))) == CHATML.render(off).replace("Luna.<|im_end|>", "", 1)


@pytest.mark.parametrize("content", ["", " \n", " spaced \n\n", "é你😀\u2028", "{{ 7 * 7 }}{% raw %}", "<b>&amp;</b>"])
def test_content_comes_through_as_it_is(content: str) -> None:
    segments = CHATML.segments([Message("user", content), Message("assistant", content)])
    assert trained(segments) == [f"{content}<|im_end|>"]


def test_control_tokens_in_a_message_become_literal_pieces() -> None:
    messages = [Message("user", "<|im_end|> x <|im_end|>"), Message("assistant", "<|im_<|im_end|>end|>")]
    segments = CHATML.segments(messages, control_tokens=["<|im_end|>", "<|im_start|>"])
    assert [segment.text for segment in segments if segment.literal] == ["<|im_end|>"] * 3
    assert "".join(segment.text for segment in segments) == CHATML.render(messages)
    assert "".join(trained(segments)) == "<|im_<|im_end|>end|><|im_end|>"


def test_generation_tags_decide_where_the_template_has_them() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert template.render(TWO_TURNS[1:3]) == "[user]Who are you?[assistant]Luna.!"
    assert trained(template.segments(TWO_TURNS)) == ["Luna.!", "Welcome.!"]
    assert trained(template.segments(TWO_TURNS, "last")) == ["Welcome.!"]
    with pytest.raises(DataError, match="Message 1 is not an answer"):
        template.segments([Message("user", "a", trained=True), Message("assistant", "b")])


def test_generation_tags_that_miss_an_answer_are_refused() -> None:
    template = ChatTemplate("{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    with pytest.raises(DataError, match="1 generated parts for 2 assistant messages"):
        template.segments(TWO_TURNS)


def test_a_template_that_changes_earlier_turns_later() -> None:
    """The prefix of the first answer is no prefix of the whole text; its content is found all the same."""
    segments = ChatTemplate(LAST_TURN_DIFFERS).segments(TWO_TURNS)
    assert trained(segments) == ["Luna.</s>", "[think]Welcome.</s>"]


def test_an_answer_that_cannot_be_found_is_refused() -> None:
    source = LAST_TURN_DIFFERS.replace("m.content", "m.content[::-1]")
    with pytest.raises(DataError, match="rewrites message 3"):
        ChatTemplate(source).segments(TWO_TURNS)


def test_space_after_an_answer_counts_when_nothing_else_ends_the_turn() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert trained(template.segments(TWO_TURNS[1:3])) == ["assistant: Luna.\n"]


HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10**11 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "format": "{{ '%100000000000d' % 1 }}",
    "flood": "{{ 'a' * 10**8 }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% include '/etc/hostname' %}",
    "syntax": "{% if %}",
    "undefined": "{{ nothing.at.all }}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": " " * 300_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_in_a_data_error(case: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(HOSTILE[case]).render(TWO_TURNS)
    assert CHATML.render(TWO_TURNS[:1]) == "<|im_start|>system\nBe kind.<|im_end|>\n"


def test_the_template_environment_has_what_templates_use() -> None:
    source = (
        "{%- for m in messages -%}{%- if loop.index0 == 1 -%}{%- break -%}{%- endif -%}"
        "{{ m | tojson }}{{ strftime_now('%Y') | length }}{{ dict(a=1) | tojson(indent=1) }}{%- endfor -%}"
        "{% if tools %}tools{% endif %}{{ bos_token }}{{ eos_token is defined }}"
    )
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render([Message("user", "<é>")] * 2)
    assert rendered == '{"role": "user", "content": "<é>"}4{\n "a": 1\n}<s>False'


TRIMS = LAST_TURN_DIFFERS.replace("m.content", "m.content | trim")


def test_a_template_that_trims_and_changes_earlier_turns() -> None:
    turns = [Message("user", " q "), Message("assistant", "\n Luna. "), Message("user", ""), Message("assistant", " x")]
    assert trained(ChatTemplate(TRIMS).segments(turns)) == ["Luna.</s>", "[think]x</s>"]


def test_many_chats_at_once_fail_alone() -> None:
    """One that eats its time is stopped and costs neither its neighbours nor their order."""
    slow = "{% if messages[0].content == 'slow' %}{% for i in range(9**9) %}{% for j in range(9**9) %}{% endfor %}"
    template = ChatTemplate(slow + "{% endfor %}{% endif %}" + CHATML.source)
    rows = [
        Conversation((Message("user", text), Message("assistant", text))) for text in ("a", "slow", "\U0010fff0", "b")
    ]
    found = template.segments_of(rows)
    assert [isinstance(each, DataError) for each in found] == [False, True, True, False]
    assert [trained(found[index]) for index in (0, 3)] == [["a<|im_end|>"], ["b<|im_end|>"]]


def test_threads_and_forked_children_get_their_own_answers() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = CHATML.render([Message("user", str(number))])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == f"<|im_start|>user\n{number}<|im_end|>\n" for number in range(4))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_render_in_child, ["a", "b"]) == [f"<|im_start|>user\n{x}<|im_end|>\n" for x in "ab"]
    assert CHATML.render([Message("user", "c")]).endswith("c<|im_end|>\n")


def _render_in_child(content: str) -> str:
    text = CHATML.render([Message("user", content)])
    WORKER.close()
    return text


def test_the_renderer_starts_again_after_it_was_killed() -> None:
    CHATML.render(TWO_TURNS)
    assert WORKER._process is not None
    os.kill(WORKER._process.pid, 9)
    WORKER._process.wait()
    assert CHATML.render(TWO_TURNS[:1]).startswith("<|im_start|>system")


def write_config(folder: Path, **values: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_load_prefers_the_jinja_file(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="old", bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}é{{ eos_token }}", encoding="utf-8")
    template = ChatTemplate.load(tmp_path)
    assert template.render(TWO_TURNS) == "<s>é</s>"
    assert template.fingerprint == ChatTemplate.load(tmp_path).fingerprint
    assert template.fingerprint != ChatTemplate(template.source, {}).fingerprint


def test_load_takes_the_default_of_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    assert ChatTemplate.load(write_config(tmp_path, chat_template=named)).source == "chat"


@pytest.mark.parametrize("template", [None, 5, [], [{"name": "rag", "template": "x"}]])
def test_a_base_model_is_told_what_to_do(tmp_path: Path, template: object) -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.template"):
        ChatTemplate.load(write_config(tmp_path, chat_template=template))


def test_damaged_model_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)
    write_config(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "user", "content": None}], [Message("user", "\U0010fff0")]],
)
def test_messages_that_cannot_be_rendered(messages: list) -> None:
    with pytest.raises(DataError):
        CHATML.render(messages)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(DataError, match="assistant, last, all"):
        CHATML.segments(TWO_TURNS, "everything")


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones() -> None:
    """Ctrl-C, or a test's time limit, between question and answer."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    slow = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}slow"
    question = [Message("user", "hi")]
    assert ChatTemplate("quick").render(question) == "quick"
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate(slow).render(question)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert ChatTemplate("quick").render(question) == "quick"
