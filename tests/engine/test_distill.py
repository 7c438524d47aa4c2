"""Answers of the base model become rows and probes; what was answered is not asked again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studio import jobs
from studio.data.files import read_rows
from studio.data.formats import read_conversations
from studio.data.general import Prompt, general_prompts
from studio.data.tokens import fingerprint
from studio.engine import answers
from studio.engine.answers import Answer, AnswerMemory, ask, ask_base
from studio.engine.devices import pick_device, pick_dtype
from studio.engine.distill import general_probes, spread, training_rows, usable_shares, usable_text
from studio.engine.job import StopRequested
from studio.engine.models.load import LoadedModel
from studio.probes.likeness import loops
from studio.projects import Project
from studio.store import datasets, open_db

QUESTIONS = [[{"role": "user", "content": f"Tell me about the {name} house."}] for name in ("red", "blue", "green")]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer("Paris.", True), "Paris."),
        (Answer("Paris", True), "Paris"),
        (Answer("Paris is big. It has 2.1 million inhab", False), "Paris is big."),
        (Answer('He said "yes." And then he', False), 'He said "yes."'),
        (Answer("北京很大。它有两千", False), "北京很大。"),
        (Answer("no end in sight", False), ""),
        (Answer("the legendary man, " * 12 + "the end.", True), ""),
        (Answer("", True), ""),
    ],
)
def test_usable_text(answer: Answer, text: str) -> None:
    assert usable_text(answer, "What is the capital of France?") == text


def test_a_repeated_question_is_no_answer() -> None:
    assert usable_text(Answer("谁发明了电话？－－－", False), "谁发明了电话？") == ""
    assert usable_shares(
        [Prompt("a?", "en", "near"), Prompt("b?", "en", "far")], [Answer("A!", True), Answer("No.", True)]
    ) == {"en": 0.5}


def test_probes_without_a_sound_answer_measure_nothing() -> None:
    prompts = [Prompt("a?", "en", "near"), Prompt("b?", "en", "far")]
    found = general_probes(prompts, [Answer("美丽" * 40, False), Answer("Yes and", False)])
    assert [(probe["reference"], probe["reference_finished"]) for probe in found] == [("", False), ("Yes and", False)]


def test_prose_does_not_loop() -> None:
    assert not loops(
        "The theory of relativity was developed by Albert Einstein. It says that space and time are one, and that "
        "mass and energy are two forms of the same thing, which changed physics for ever."
    )


def test_unusable_answers_are_left_out_of_training() -> None:
    prompts = [Prompt("a?", "en", "near"), Prompt("b?", "en", "far")]
    rows = training_rows(prompts, [Answer("cut", False), Answer("Yes.", True)])
    assert [row.messages[0].content for row in rows] == ["b?"]
    assert rows[0].meta == {"source": "general", "category": "far", "language": "en"}


def test_a_limit_takes_from_the_whole_list() -> None:
    prompts = general_prompts(["en"]).train
    few = spread(prompts, 6)
    assert len(few) == 6 and {prompt.category for prompt in few} == {"near", "far"}
    assert spread(prompts, 0) == spread(prompts, 10_000) == prompts


def test_answers_are_remembered(load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny()
    progress: list[int] = []
    first = ask_base(loaded, loaded.model, QUESTIONS, 8, progress.append)
    assert progress == [0, 1, 2, 3]
    monkeypatch.setattr(answers, "Decoding", None)  # asking again would fail
    assert ask_base(loaded, loaded.model, QUESTIONS, 8) == first


def test_a_stopped_job_keeps_what_it_has(
    load_tiny: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    whole = ask_base(loaded, loaded.model, QUESTIONS, 6)
    monkeypatch.setattr(answers, "ROWS_PER_BATCH", 1)
    num_looks = 0

    def stop_soon() -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks > 8:
            raise StopRequested(save=True)

    with pytest.raises(StopRequested):
        ask_base(loaded, loaded.model, QUESTIONS, 7, check_stop=stop_soon)
    with AnswerMemory.of(loaded, 7) as memory:
        assert 1 <= sum(memory.get(question) is not None for question in QUESTIONS) < 3
    assert [answer.text[:4] for answer in ask_base(loaded, loaded.model, QUESTIONS, 7)] == [a.text[:4] for a in whole]


def test_an_answer_ends_at_a_text_that_the_template_ends_with(load_tiny: Callable[..., LoadedModel]) -> None:
    loaded = load_tiny()
    torch.manual_seed(3)  # the tiny model repeats the last token of each prompt: another head says other things
    loaded.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(loaded.model.lm_head.weight))
    whole = dict(ask(loaded, loaded.model, QUESTIONS, 12))
    stop = whole[0].text[6:9]
    cut = dict(ask(replace(loaded, stops=(stop,)), loaded.model, QUESTIONS, 12))
    assert len(stop) == 3
    for number in range(3):
        text, _, more = whole[number].text.partition(stop)
        assert cut[number] == (Answer(text.strip(), True) if more else whole[number])
    assert cut[0].finished and not all(each.finished for each in cut.values())
    with AnswerMemory.of(loaded, 7) as one, AnswerMemory.of(replace(loaded, stops=("x",)), 7) as other:
        assert one._path != other._path


def test_a_half_written_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerMemory(path) as memory:
        for question in QUESTIONS[:2]:
            memory.put(question, Answer("text 好\u2028and more", True))
    path.write_bytes(path.read_bytes()[:-9])
    with AnswerMemory(path) as memory:
        assert memory.get(QUESTIONS[0]) == Answer("text 好\u2028and more", True)
        assert memory.get(QUESTIONS[1]) is None
        memory.put(QUESTIONS[1], Answer("again", False))
    with AnswerMemory(path) as memory:
        assert memory.get(QUESTIONS[1]) == Answer("again", False)


def test_the_job_writes_and_registers(
    project: Project, tiny_model: Path, load_tiny: Callable[..., LoadedModel]
) -> None:
    """The tiny model babbles, so most of its answers are put into the memory; the job asks for the rest."""
    device = pick_device("cpu")
    prompts = general_prompts(["en", "zh"])
    asked = spread(prompts.train, 5) + spread(prompts.held_out, 5)
    with AnswerMemory.of(load_tiny(dtype=pick_dtype("auto", device)), 8) as memory:
        for number, prompt in enumerate(asked[:-2]):
            memory.put([{"role": "user", "content": prompt.text}], Answer(f"Answer {number}.", True))
    args = {"base": str(tiny_model), "dataset": "general", "languages": ["en", "zh"], "limit": 5, "max_new_tokens": 8}
    *_, job = jobs.watch(project.folder, jobs.start(project.folder, "distill", args).id)
    assert (job.state, job.cause) == ("finished", "")
    assert (job.current, job.total, job.unit) == (10, 10, "prompts")
    rows = read_conversations(project.path("data", "general.jsonl"))
    probes = [row for _, row in read_rows(project.path("data", "general.probes.jsonl"))]
    with open_db(project.folder) as db:
        dataset = datasets.get(db, "general")
    assert (dataset.kind, dataset.num_rows, dataset.num_probes) == ("general", 5, 5)
    assert dataset.fingerprint == fingerprint(rows)
    assert [row.messages[1].content for row in rows] == [f"Answer {number}." for number in range(5)]
    assert [probe["reference"] for probe in probes[:3]] == ["Answer 5.", "Answer 6.", "Answer 7."]
    assert {probe["messages"][0]["content"] for probe in probes} == {prompt.text for prompt in asked[5:]}


def test_a_model_that_cannot_answer_is_refused(project: Project, tiny_model: Path) -> None:
    args = {"base": str(tiny_model), "languages": ["en"], "limit": 4, "max_new_tokens": 1}
    *_, job = jobs.watch(project.folder, jobs.start(project.folder, "distill", args).id)
    assert job.state == "failed"
    assert "of 4 answers" in job.cause and "can be trained on" in job.cause
    assert not project.path("data", "general.jsonl").exists()
