"""The judge behind an endpoint: off without one, read strictly, and its key is nowhere but in the request."""

import httpx
import pytest

from studio import scores
from studio.probes.assertions import Said
from studio.probes.judge import Judge
from studio.probes.reading import parse_suite

SUITE = """groups:
  - name: tone
    probes:
      - ask: Hello
        assert: [{type: llm-rubric, value: is friendly}]
      - ask: Hello again
        assert: [{type: not-llm-rubric, value: is rude}]
"""
NAMED = {"RETUNE_JUDGE_URL": "http://127.0.0.1:9/v1/", "RETUNE_JUDGE_MODEL": "big", "RETUNE_JUDGE_KEY": "s3cret"}


def judge(said: str, status: int = 200, asked: list[httpx.Request] | None = None) -> Judge:
    def answer(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append(request)
        return httpx.Response(status, json={"choices": [{"message": {"content": said}}]})

    return Judge("http://judge/v1", "big", "s3cret", httpx.MockTransport(answer))


def test_there_is_none_until_the_environment_names_one() -> None:
    assert Judge.from_environment({}) is None
    found = Judge.from_environment(NAMED)
    assert found and (found.url, found.model) == ("http://127.0.0.1:9/v1", "big") and "s3cret" not in repr(found)
    probe = parse_suite(SUITE, "x").probes()[0]
    marked = scores.mark(probe, Said("Hi"), Said("Hi"))
    assert not marked.judged and marked.marks[0].why == "no judge is configured"
    assert scores.scorecard([marked])["all"]["tuned"]["total"] == 0


def test_its_verdict_counts_and_is_turned_round() -> None:
    asked: list[httpx.Request] = []
    first, second = parse_suite(SUITE, "x").probes()
    [mark] = first.marks(Said("Hi, friend"), judge("PASS\nIt greets.", asked=asked))
    assert (mark.passed, mark.why) == (True, "It greets.")
    assert asked[0].headers["authorization"] == "Bearer s3cret" and b"Hi, friend" in asked[0].content
    assert [mark.passed for mark in second.marks(Said("Go away"), judge("**PASS**\nIt is rude."))] == [False]


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        ("PASS: it greets.", True), ("FAIL - it greets.", False), ("**Fail**\nit greets.", False),
        ("<think>Is it a greeting? FAIL?</think>\nPASS\nit greets.", True), ("PASSABLE", None),
        ("PASS or FAIL: it fails.", None), ("PASS/FAIL: FAIL", None), ("<think>It was cut: PASS", None),
    ],
)  # fmt: skip
def test_a_verdict_is_its_first_word(said: str, passed: bool | None) -> None:
    [mark] = parse_suite(SUITE, "x").probes()[0].marks(Said("Hi"), judge(said))
    assert mark.passed is passed and (passed is None or mark.why == "it greets.")


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [("Well, PASS I guess", 200, "neither"), ("", 200, "neither"), ("x", 401, "status 401"), ("x", 500, "status 500")],
)
def test_what_it_does_not_decide_stays_open(said: str, status: int, why: str) -> None:
    mark = judge(said, status).mark("is friendly", "Hello", "Hi")
    assert mark.passed is None and why in mark.why


def test_one_that_is_not_there_decides_nothing_and_tells_no_key() -> None:
    found = Judge.from_environment(NAMED)
    assert found
    mark = found.mark("is friendly", "Hello", "Hi")
    assert mark.passed is None and "did not answer (ConnectError)" in mark.why and "s3cret" not in mark.why
