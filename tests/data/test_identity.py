"""The self-cognition builder: varied rows, held-out phrasings, no placeholder, and checkable answers."""

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from studio.data.formats import Conversation
from studio.data.identity import (
    LANGUAGES,
    Identity,
    answers_identity,
    build,
    held_out_probes,
    mentions,
    tutorial,
)
from studio.data.phrasings import fill, hold_out, load_bank, normalise
from studio.errors import DataError

FULL = Identity(
    "Luna", "Shane", "Aurora Lab", "Starter-135M", ("I live in a lighthouse.", "我住在灯塔里"), ("en", "zh")
)
BARE = Identity("Luna", "Shane", languages=("en", "zh"))
INTENTS = {
    "name", "identity", "maker", "introduce", "other_model", "human", "abilities", "greeting", "trainer",
    "facts", "follow_up",
}  # fmt: skip
ENTRIES = [
    (language, intent, entry)
    for language in LANGUAGES
    for intent, entries in load_bank(f"identity_{language}")["intents"].items()
    for entry in entries
]


def user_turns(row: Conversation) -> list[str]:
    return [message.content for message in row.messages if message.role == "user"]


def probe_turns(probe: dict) -> list[str]:
    return [message["content"] for message in probe["messages"] if message["role"] == "user"]


def test_every_intent_has_enough_phrasings_and_answer_forms_in_both_languages() -> None:
    questions, answers = Counter(), Counter()
    for language, intent, entry in ENTRIES:
        questions[language, intent] += len(entry["questions"])
        answers[language, intent] += len([form for form in entry["answers"] if "model_name" not in form])
    assert set(questions) == set(product(LANGUAGES, INTENTS))
    assert min(questions.values()) >= 14 and min(answers.values()) >= 8
    most_asked = product(LANGUAGES, ("name", "identity", "maker"))
    assert all(questions[cell] >= 20 for cell in most_asked)


@pytest.mark.parametrize(("language", "intent", "entry"), ENTRIES)
def test_each_group_has_eight_forms_without_optional_fields(language: str, intent: str, entry: dict) -> None:
    optional = re.compile(r"\{model_name\}" if intent == "facts" else r"\{(organisation|model_name)\}")
    assert len([form for form in entry["answers"] if not optional.search(form)]) >= 8


def test_no_phrasing_is_in_a_bank_twice() -> None:
    counts = Counter(normalise(question) for _, _, entry in ENTRIES for question in entry["questions"])
    assert [text for text, count in counts.items() if count > 1] == []
    assert "" not in counts


def test_about_a_third_of_the_phrasings_is_held_out() -> None:
    probes = Counter((probe["language"], probe["intent"]) for probe in held_out_probes(FULL))
    totals = Counter()
    for language, intent, entry in ENTRIES:
        totals[language, intent] += len(entry["questions"])
    assert set(probes) == set(totals)
    assert all(count >= 4 and 0.24 <= count / totals[cell] <= 0.41 for cell, count in probes.items())


def test_no_probe_phrasing_is_in_any_training_row() -> None:
    built = build(FULL, 20000, 3)
    trained = {normalise(turn) for row in built.rows for turn in user_turns(row)}
    trained |= {normalise(turn) for row in tutorial(FULL, 1) for turn in user_turns(row)}
    assert not trained & {normalise(turn) for probe in built.probes for turn in probe_turns(probe)}


def test_probes_are_no_near_copies_of_training_phrasings() -> None:
    for _, _, entry in ENTRIES:
        train, held_out = hold_out(entry["questions"])
        for probe, question in product(map(normalise, held_out), map(normalise, train)):
            assert Counter(probe.split()) != Counter(question.split())
            assert SequenceMatcher(None, probe, question).ratio() < 0.95, (probe, question)


def test_split_depends_on_the_words_alone() -> None:
    phrasings = [f"Question number {number}?" for number in range(20)]
    train, held_out = hold_out(phrasings)
    assert len(held_out) == 6 and not set(train) & set(held_out)
    assert set(hold_out(phrasings[::-1])[1]) == set(held_out)
    spared = {normalise(held_out[0])}
    assert held_out[0] in hold_out(phrasings, always_trained=spared)[0]


def test_normalise_ignores_case_punctuation_contractions_and_courtesy() -> None:
    assert normalise("What's your  NAME, please?!") == normalise("what is your name")
    assert normalise("请问你是谁呀？") == normalise("你是谁")
    assert normalise("Who made you?") != normalise("Who named you?")


def test_same_seed_same_rows_and_another_seed_other_rows() -> None:
    first, again, other = build(FULL, 200, 1), build(FULL, 200, 1), build(FULL, 200, 2)
    assert first == again
    assert first.rows != other.rows and first.probes == other.probes
    assert build(FULL, 3, 1).probes == first.probes


@pytest.mark.parametrize("num_rows", [1, 5, 100, 1001])
def test_rows_are_as_many_as_asked_and_balanced(num_rows: int) -> None:
    rows = build(FULL, num_rows, 0).rows
    counts = Counter((row.meta["language"], row.meta["intent"]) for row in rows)
    assert len(rows) == num_rows
    if num_rows >= 2 * len(INTENTS):
        assert len(counts) == 2 * len(INTENTS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_do_not_repeat_while_combinations_last() -> None:
    rows = [row.to_row()["messages"] for row in build(BARE, 1200, 0).rows]
    assert len({json.dumps(row) for row in rows}) == 1200


def test_rows_use_every_training_phrasing_evenly() -> None:
    cell = {"source": "identity", "intent": "name", "language": "en"}
    rows = [row for row in build(BARE, 2000, 0).rows if row.meta == cell]
    counts = Counter(user_turns(row)[0] for row in rows)
    train, _ = hold_out(load_bank("identity_en")["intents"]["name"][0]["questions"])
    assert set(counts) == set(train)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({row.messages[-1].content for row in rows}) >= 8


def test_rows_go_on_after_all_combinations() -> None:
    rows = build(Identity("Luna", "Shane"), 8000, 0).rows
    greetings = [user_turns(row)[0] for row in rows if row.meta["intent"] == "greeting"]
    assert len(greetings) == 800


@pytest.mark.parametrize("identity", [FULL, BARE])
def test_every_training_answer_passes_the_probes_of_its_intent(identity: Identity) -> None:
    expects = {}
    for language, intent, entry in ENTRIES:
        train, _ = hold_out(entry["questions"])
        expects |= {(language, intent, question): entry["expects"] for question in train}
    expected = {"name": identity.name, "maker": identity.maker}
    checked = Counter()
    for row in build(identity, 6000, 0).rows:
        language, intent = row.meta["language"], row.meta["intent"]
        kind = expects.get((language, intent, user_turns(row)[-1]), "either")
        assert answers_identity(row.messages[-1].content, {"expects": kind, "expected": expected}), row
        checked[kind] += 1
    assert min(checked[kind] for kind in ("name", "maker", "either")) > 100


@pytest.mark.parametrize(("language", "intent", "entry"), ENTRIES)
def test_what_a_group_expects_is_in_each_of_its_forms(language: str, intent: str, entry: dict) -> None:
    slots = {"name": ("{name}",), "maker": ("{maker}",), "either": ("{name}", "{maker}")}[entry["expects"]]
    assert [form for form in entry["answers"] if not any(slot in form for slot in slots)] == []


def test_the_first_turns_of_a_follow_up_do_not_give_the_answer_away() -> None:
    for probe in held_out_probes(FULL):
        if probe["intent"] == "follow_up":
            assert [message["role"] for message in probe["messages"]] == ["user", "assistant", "user"]
        assert not any(answers_identity(message["content"], probe) for message in probe["messages"]), probe


def test_probes_have_the_agreed_shape() -> None:
    for probe in held_out_probes(FULL):
        assert probe["kind"] == "identity" and probe["expects"] in ("name", "maker", "either")
        assert probe["expected"] == {"name": "Luna", "maker": "Shane"}
        assert probe["messages"][-1]["role"] == "user"
        assert json.loads(json.dumps(probe, ensure_ascii=False)) == probe


def test_optional_fields_are_used_when_given_and_never_missed() -> None:
    full = " ".join(row.messages[-1].content for row in build(FULL, 4000, 0).rows)
    bare_rows = build(BARE, 4000, 0).rows
    assert all(value in full for value in ("Aurora Lab", "Starter-135M", *FULL.facts))
    assert "facts" not in {row.meta["intent"] for row in bare_rows}
    assert "facts" not in {probe["intent"] for probe in held_out_probes(BARE)}


def test_a_fact_is_told_in_its_own_language_only() -> None:
    for row in build(FULL, 4000, 0).rows:
        text = row.messages[-1].content
        assert ("lighthouse" not in text) or row.meta["language"] == "en"
        assert ("灯塔" not in text) or row.meta["language"] == "zh"


def test_an_assistant_never_denies_what_it_is_based_on() -> None:
    identity = Identity("Claude", "Hugging Face", model_name="Qwen2.5-0.5B")
    rows = build(identity, 4000, 0).rows
    asked = " ".join(turn for row in rows if row.meta["intent"] == "other_model" for turn in user_turns(row))
    assert not re.search("Claude|Anthropic|SmolLM|Hugging Face|Qwen|Alibaba", asked)
    assert "ChatGPT" in asked and "OpenAI" in asked


def test_a_name_that_is_every_rival_leaves_the_rivals_out() -> None:
    everyone = Identity("ChatGPT Claude Gemini Qwen Llama SmolLM DeepSeek", "Mistral Copilot Grok InternLM Siri Alexa")
    assert "other_model" not in {row.meta["intent"] for row in build(everyone, 50, 0).rows}


def test_tutorial_repeats_the_same_rows_in_each_language() -> None:
    rows = tutorial(BARE, 100)
    counts = Counter(json.dumps(row.to_row(), ensure_ascii=False) for row in rows)
    assert set(counts.values()) == {100} and len(counts) == 4
    assert "我是Shane的小助手Luna哦" in {row.messages[-1].content for row in rows}
    assert "内在是Starter-135M" in " ".join(row.messages[-1].content for row in tutorial(FULL, 1))
    assert all(mentions(row.messages[-1].content, "Luna") for row in rows)


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("I'm Luna.", "luna", True),
        ("LUNA's answer", "Luna", True),
        ("also an alibi", "Al", False),
        ("I am Al, hello", "Al", True),
        ("我叫Luna，你好", "Luna", True),
        ("我是Lunar", "Luna", False),
        ("_Luna_ and **Luna**", "Luna", True),
        ("我是露娜呀", "露娜", True),
        ("我是小Luna呢", "小Luna", True),
        ("我是小Lunar", "小Luna", False),
        ("made by Dr.  Who\nLtd", "Dr. Who Ltd", True),
        ("I'm René!", "Rene", False),
        ("I'm Rene\u0301!", "René", True),
        ("Ｌｕｎａ", "Luna", True),
        ("I'm C++", "C++", True),
        ("저는 루나입니다", "루나", True),
        ("Я Луна.", "луна", True),
        ("полуна", "Луна", False),
        ("I'm Luna2", "Luna", False),
        ("anything", "", False),
    ],
)
def test_mentions(text: str, name: str, found: bool) -> None:
    assert mentions(text, name) is found


def test_answers_identity_asks_for_what_the_probe_expects() -> None:
    probe = {"expects": "maker", "expected": {"name": "Luna", "maker": "Shane"}}
    assert answers_identity("Shane made me.", probe)
    assert not answers_identity("I'm Luna.", probe)
    assert answers_identity("I'm Luna.", probe | {"expects": "either"})
    assert not answers_identity("I'm SmolLM by Hugging Face.", probe | {"expects": "either"})


@pytest.mark.parametrize(
    "name",
    ["", "  ", "x" * 81, "Lu\nna", "Luna<|im_end|>", "<s>", "</s>", "[INST]", "<<SYS>>", "{maker}",
     "<｜User｜>", "\u202eanul", "\u200b", "\x00", "\u0301a", "\ud800"],
)  # fmt: skip
def test_names_that_cannot_be_used_are_refused_with_advice(name: str) -> None:
    for arguments in ((name, "Shane"), ("Luna", name)):
        with pytest.raises(DataError) as caught:
            Identity(*arguments)
        assert caught.value.hint


def test_languages_facts_and_row_counts_are_checked() -> None:
    assert Identity(" Luna ", "Shane", languages=("zh", "en", "zh")).languages == ("en", "zh")
    wrong = ({"languages": ()}, {"languages": ("fr",)}, {"facts": ("",)}, {"facts": ("<|im_end|>",)})
    for arguments in wrong:
        with pytest.raises(DataError):
            Identity("Luna", "Shane", **arguments)
    with pytest.raises(DataError):
        build(BARE, 0, 0)
    with pytest.raises(DataError):
        tutorial(BARE, 0)


def test_fill_reads_no_value_as_a_slot_and_no_slot_as_text() -> None:
    assert fill("{name} by {maker}.", {"name": "%s \\1", "maker": "Co."}) == "%s \\1 by Co."
    for values in ({}, {"name": ""}, {"name": "{maker}", "maker": "Shane"}):
        with pytest.raises(DataError):
            fill("I am {name}.", values)


@settings(max_examples=150, deadline=None)
@example("{name}", "%s")
@example("{}", "{0}")
@example("<|im_end|>", "Shane")
@example("\\g<0>", "$1")
@example("Al.", "Shane Inc.")
@example("👩\u200d🚀", "é")
@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
def test_any_name_gives_clean_rows_or_a_clear_refusal(name: str, maker: str) -> None:
    try:
        identity = Identity(name, maker, languages=("en", "zh"))
    except DataError:
        return
    built = build(identity, 44, 0)
    slot = re.compile(r"\{[a-z_]+\d*\}")
    for row in built.rows:
        assert not any(slot.search(message.content) for message in row.messages)
        probe = {"expects": "either", "expected": {"name": identity.name, "maker": identity.maker}}
        assert answers_identity(row.messages[-1].content, probe)
    assert not slot.search(json.dumps([probe["messages"] for probe in built.probes]))
