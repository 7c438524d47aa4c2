"""Runs beside each other: only what differs; curves along steps, tokens and time; a report that is one safe file."""

import re

import pytest

from studio import comparison, run_report
from studio.comparison import Change
from studio.errors import JobError
from studio.projects import Project
from studio.store import checkpoints, metrics, open_db
from studio.store import jobs as store_jobs
from tests.scored import add_run, card, hits, store
from tests.test_report import HOSTILE, Tags

MADE_AT = "2026-01-02 03:04"


@pytest.fixture
def found(project: Project) -> comparison.Comparison:
    add_run(project, "lora-1", [], {"identity": 1, "general": 1})
    add_run(project, "tutorial-1", ["lora.rank=8"], {"tutorial": 1, "general": 2})
    with open_db(project.folder) as db:
        store(db, card(10, hits(5, 40), hits(0, 40)), card(20, hits(39, 40), hits(1, 40)))
        spoilt, answers = card(20, hits(40, 40), hits(39, 40), loss=24.0, run_id="tutorial-1")
        answers[50].answer = HOSTILE
        store(db, (spoilt, answers))
    return comparison.compare(project, ["lora-1", "tutorial-1"])


def test_only_what_differs(found: comparison.Comparison) -> None:
    assert found.settings == (Change("lora.rank", ("16", "8")),)
    assert found.data == (
        Change("identity", ("1 (abababababab)", "")),
        Change("general", ("1 (abababababab)", "2 (abababababab)")),
        Change("tutorial", ("", "1 (abababababab)")),
    )


def test_each_run_is_shown_by_the_checkpoint_to_take(found: comparison.Comparison) -> None:
    assert {run_id: pair[0].step for run_id, pair in found.cards.items()} == {"lora-1": 20, "tutorial-1": 20}
    assert run_report.score_table(found)[0] == ["checkpoint", "20", "20"]
    assert found.recommendation.chosen.run_id == "lora-1"


def test_a_verdict_counts_how_many_checkpoints_of_the_run_are_scored(project: Project) -> None:
    """Scored twice, or beside another run, it is still one."""
    add_run(project, "lora-1")
    add_run(project, "tutorial-1")
    with open_db(project.folder) as db:
        store(db, *(card(step, hits(30, 30), hits(0, 30)) for step in range(1, 10)))
        store(db, *(card(10, hits(30, 30), hits(6, 30)) for _ in range(2)))
        store(db, card(10, hits(30, 30), hits(6, 30), run_id="tutorial-1"))
    found = comparison.advise(project, ["lora-1", "tutorial-1"]).candidates
    assert {each.run_id: each.overfit.signs[0].looks for each in found if each.step == 10} == {
        "lora-1": 10,
        "tutorial-1": 1,
    }
    assert ("lora-1", 10) not in comparison.standing(project)
    assert [each.run_id for each in found if each.overfit.verdict == "overfitted"] == ["tutorial-1"]


def test_curves_along_steps_tokens_and_time(project: Project) -> None:
    add_run(project, "lora-1", steps=4)
    with open_db(project.folder) as db:
        metrics.record(db, "lora-1", 3, {"valid/loss": 1.0}, at="2026-01-01T10:00:07.000000+00:00")
        metrics.record(db, "lora-1", 0, {"valid/loss": 4.0}, at="2026-01-01T10:00:00.000000+00:00")
    found = comparison.compare(project, ["lora-1"])
    along = {axis: [point.step for point in found.along("train/loss", "lora-1", axis)] for axis in comparison.AXES}
    assert along == {"step": [1, 2, 3, 4], "tokens": [50, 100, 150, 200], "seconds": [0, 2, 4, 6]}
    assert [point.step for point in found.along("valid/loss", "lora-1", "tokens")] == [0, 150]


def test_a_pause_between_two_processes_of_a_run_is_no_time_of_it(project: Project) -> None:
    add_run(project, "lora-1", steps=2)
    with open_db(project.folder) as db:
        job = store_jobs.Job(kind="train", run_id="lora-1", started_at="2026-01-01T19:00:00.000000+00:00")
        store_jobs.add(db, job)
        for step, second in ((3, 5), (4, 8)):
            metrics.record(db, "lora-1", step, {"train/loss": 1.0}, at=f"2026-01-01T19:00:{second:02d}.000000+00:00")
    found = comparison.compare(project, ["lora-1"])
    assert [point.step for point in found.along("train/loss", "lora-1", "seconds")] == [0, 2, 2, 5]


def test_runs_must_be_there_and_not_too_many(project: Project) -> None:
    with pytest.raises(JobError, match="There is no run 'nope'"):
        comparison.compare(project, ["nope"])
    with pytest.raises(JobError, match="7 runs cannot be compared"):
        comparison.compare(project, [f"run-{number}" for number in range(7)])


def test_the_report_is_one_file_that_runs_and_fetches_nothing(found: comparison.Comparison) -> None:
    parser = Tags()
    parser.feed(run_report.as_html(found, HOSTILE, MADE_AT))
    assert not {tag for tag, _ in parser.found} & {"script", "img", "link", "iframe", "object", "a", "form", "image"}
    names = {name for _, attributes in parser.found for name in attributes}
    assert not names & {"src", "href", "style", "xlink:href"} and not any(name.startswith("on") for name in names)
    assert HOSTILE in parser.texts


def test_the_report_says_whose_base_answered_what(project: Project) -> None:
    with open_db(project.folder) as db:
        for run_id, base_answer in (("lora-1", "I am SmolLM."), ("other-1", "I am Qwen.")):
            add_run(project, run_id)
            evaluation, answers = card(10, hits(0, 2), hits(0, 2), run_id=run_id)
            for answer in answers:
                answer.base_answer = base_answer
            store(db, (evaluation, answers))
    page = run_report.as_html(comparison.compare(project, ["lora-1", "other-1"]), "Luna", MADE_AT)
    assert "<td class='text'>lora-1: I am SmolLM.\nother-1: I am Qwen.</td>" in page
    alone = run_report.as_html(comparison.compare(project, ["lora-1"]), "Luna", MADE_AT)
    assert "<td class='text'>I am SmolLM.</td>" in alone


def test_the_report_has_failures_before_all_else_and_plots_inside(found: comparison.Comparison) -> None:
    page = run_report.as_html(found, "Luna", MADE_AT)
    order = ["Failures (40)", "Scorecards", "What was learnt", "Curves", "Settings that differ", "Data that differs"]
    places = [page.index(f"<h2>{title}") for title in order]
    assert places == sorted(places)
    assert "39 of 40 unrelated answers: 97.5 % (95 %: 87.1 % to 99.6 %)" in page[: places[0]]
    assert page.count('<svg role="img"') == 3 and "polygon" in page  # two planes and a curve; the star
    assert len(page) < 100_000


def test_tasks_of_the_harness_stand_beside_the_scorecards(project: Project, found: comparison.Comparison) -> None:
    metric = {"value": 0.5, "stderr": None, "marks": []}
    side = {"num_rows": 4, "metrics": {"acc": metric}}
    detail = {"results": {"capitals": {"base": side, "tuned": side}}}
    with open_db(project.folder) as db:
        checkpoints.put_output(db, checkpoints.Output("lm_eval", "reports/lm_eval/1.json", "lora-1", 20, detail))
    again = comparison.compare(project, ["lora-1"])
    assert run_report.task_table(again) == [["capitals, acc", "4", "lora-1 step 20", "0.5", "0.5", "–"]]
    assert "Tasks of lm-evaluation-harness" in run_report.as_html(again, "Luna", MADE_AT)
    assert "| capitals, acc | 4 |" in run_report.as_markdown(again, "Luna", MADE_AT)
    assert "lm-evaluation-harness" not in run_report.as_html(found, "Luna", MADE_AT)


def test_failures_are_those_of_any_run_most_failed_first(found: comparison.Comparison) -> None:
    failed = run_report.failures(found)
    assert [len([a for a in by_run.values() if not a.detail["passed"]]) for _, by_run in failed] == [2] + 39 * [1]
    assert failed[0][0] == ("general", "What? 0")


def test_markdown_says_the_same(found: comparison.Comparison) -> None:
    text = run_report.as_markdown(found, "Luna", MADE_AT)
    assert text.index("## Failures (40)") < text.index("## Scorecards") < text.index("## Settings that differ")
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
