"""Scored checkpoints without a model: marks are given, scores are computed from them as the evaluate job does."""

from collections.abc import Sequence
from typing import Any

from studio import recommend, scores
from studio.recommend import Candidate
from studio.store import evaluations
from studio.store.evaluations import Answer, Evaluation


def card(
    step: int,
    said: Sequence[bool],
    leaked: Sequence[bool],
    loss: float = 10.0,
    run_id: str = "lora-1",
    about: str = "",
) -> tuple[Evaluation, list[Answer]]:
    """A scorecard whose questions are numbered; the base says SmolLM, and loses 10 nats on ten tokens."""
    marked = [
        _marked(probe, "I am Luna." if hit else "I am SmolLM.")
        for hit, probe in zip(said, _who(about, len(said)), strict=True)
    ]
    marked += [
        _marked(probe, "I am Luna." if hit else "It is so.", loss)
        for hit, probe in zip(leaked, _else(about, len(leaked)), strict=True)
    ]
    evaluation = Evaluation(
        "job", f"{run_id} step {step}", "starter", f"{step:064x}", "identity, general", scores.scorecard(marked),
        run_id=run_id, step=step,
    )  # fmt: skip
    answers = [
        Answer(evaluation.id, number, each.kind, each.intent, each.language, each.prompt, each.base_answer, each.answer,
               scores.detail(each))
        for number, each in enumerate(marked)
    ]  # fmt: skip
    return evaluation, answers


def scored(step: int, said: Sequence[bool], leaked: Sequence[bool], **more: Any) -> Candidate:
    return recommend.candidate(*card(step, said, leaked, **more))


def store(db: Any, *cards: tuple[Evaluation, list[Answer]]) -> None:
    for evaluation, answers in cards:
        evaluations.add(db, evaluation, answers)


def hits(number: int, total: int) -> list[bool]:
    return [position < number for position in range(total)]


def _marked(probe: dict[str, Any], answer: str, loss: float = 0.0) -> scores.MarkedAnswer:
    num_tokens = 10 if probe["kind"] == "general" else 0
    base = "It is so." if num_tokens else "I am SmolLM."
    return scores.mark(probe, base, answer, ["Luna", "Shane"], 10.0 if num_tokens else 0.0, loss, num_tokens)


def _who(about: str, number: int) -> list[dict[str, Any]]:
    expected = {"name": "Luna", "maker": "Shane"}
    kind = {"kind": "identity", "expects": "name", "intent": "name", "language": "en", "expected": expected}
    return [kind | {"messages": [{"role": "user", "content": f"Who{about}? {each}"}]} for each in range(number)]


def _else(about: str, number: int) -> list[dict[str, Any]]:
    kind = {"kind": "general", "intent": "far", "language": "en"}
    return [kind | {"messages": [{"role": "user", "content": f"What{about}? {each}"}]} for each in range(number)]
