"""Reports stay one file, and text stays text."""

import html.parser
import re

import pytest

from studio import report, scores
from studio.probes import paired
from studio.probes.assertions import Said
from studio.probes.reading import parse_suite
from studio.store.evaluations import Answer, Evaluation
from tests.marked import mark

HOSTILE = '<script>alert(1)</script><img src="https://evil.example/x.png"> [x](javascript:1) | `'


@pytest.fixture
def evaluation() -> Evaluation:
    identity = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "kind": "identity",
        "intent": "name",
        "expects": "name",
        "expected": {"name": "Luna", "maker": "Shane"},
    }
    general = {"messages": [{"role": "user", "content": "What is 1 + 1?"}], "kind": "general", "intent": "far"}
    marked = [
        mark(identity, "SmolLM", "Luna", ["Luna"]),
        mark(general, "2", "2", ["Luna"], base_loss=1.0, loss=1.5, num_tokens=4),
    ]
    card = scores.scorecard(marked) | {"setting": {"dtype": "float32", "note": HOSTILE}}
    return Evaluation("job", f"run-1 {HOSTILE}", "starter", "ab" * 32, "identity", card, run_id="run-1", step=8)


@pytest.fixture
def answers(evaluation: Evaluation) -> list[Answer]:
    return [
        Answer(evaluation.id, 0, "identity", "name", "en", "Who are you?", "SmolLM", "Luna", {"passed": True}),
        Answer(evaluation.id, 1, "general", "far", "en", HOSTILE, HOSTILE, HOSTILE, {"passed": False}),
    ]


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_refers_to_nothing_outside(evaluation: Evaluation, answers: list[Answer]) -> None:
    parser = Tags()
    parser.feed(report.as_html(evaluation, answers))
    tags = {tag for tag, _ in parser.found}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "form"}
    assert not any(
        name in ("src", "href", "style") or name.startswith("on") for _, found in parser.found for name in found
    )
    assert HOSTILE in parser.texts


def test_html_shows_scores_failures_first(evaluation: Evaluation, answers: list[Answer]) -> None:
    page = report.as_html(evaluation, answers)
    assert page.index("Failures (1)") < page.index("Other answers (1)")
    assert "100.0 % [20.7, 100.0]" in page
    assert "+13.3 %" in page and "missed" in page
    assert "ab" * 32 in page and "float32" in page


def test_what_no_judge_decided_is_no_failure(evaluation: Evaluation, answers: list[Answer]) -> None:
    undecided = {"passed": False, "judged": False}
    answers.append(Answer(evaluation.id, 2, "other", "", "en", "Be polite?", "No.", "Yes.", undecided))
    page = report.as_html(evaluation, answers)
    assert "Failures (1)" in page and "Other answers (2)" in page
    assert "Be polite" not in report.as_markdown(evaluation, answers)


def test_rates_by_intent_have_intervals(evaluation: Evaluation, answers: list[Answer]) -> None:
    evaluation.scores["identity_by_intent"] = {"name": paired.rate([True, False]), "maker": paired.rate([True])}
    assert "<td>name</td><td class='number'>50.0 % [9.5, 90.5]</td>" in report.as_html(evaluation, answers)


def test_markdown_keeps_its_tables(evaluation: Evaluation, answers: list[Answer]) -> None:
    text = report.as_markdown(evaluation, answers)
    assert "<script>" not in text.split("```")[0]
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]", text.split("```")[0])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4, 5}, "scores, and groups with their difference"


def test_a_suite_of_ones_own_shows_its_groups_and_what_was_not_held() -> None:
    [probe] = parse_suite(
        "groups: [{name: hours, probes: [{ask: When?, assert: [{type: contains, value: '9'}]}]}]", "shop"
    ).probes()
    card = scores.scorecard([scores.mark(probe, Said("At 9."), Said("Never."))])
    evaluation = Evaluation("job", "run-1", "starter", "ab" * 32, "", card, suite="shop")
    marks = [{"type": "contains", "passed": False, "why": "9 | <b>"}, {"type": "ends", "passed": True, "why": ""}]
    detail = {"passed": False, "marks": marks}
    answers = [Answer(evaluation.id, 0, "other", "", "en", "When?", "At 9.", "Never.", detail)]
    page, told = report.as_html(evaluation, answers), report.as_markdown(evaluation, answers)
    assert "Probes passed" in page and "Knows who it is" not in page and "contains: 9 | &lt;b&gt;" in page
    assert "| Score |" not in told and "| Probes passed |" in told and "not held: contains: 9 \\| \\<b\\>" in told


def test_score_rows(evaluation: Evaluation) -> None:
    rows = report.score_rows(evaluation)
    assert [row[0] for row in rows] == list(report.TITLES.values())
    assert rows[0][1:] == ["0.0 % [0.0, 79.3]", "100.0 % [20.7, 100.0]"]
    assert rows[2][1] == "0.0 %" and rows[2][2].startswith("+13.3 %")
