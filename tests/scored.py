"""Scored checkpoints without a model: marks are given, scores are computed from them as the evaluate job does."""

from collections.abc import Sequence
from typing import Any

from studio import recommend, runs, scores
from studio.config.catalog import preset
from studio.config.yaml import save_config, with_settings
from studio.projects import Project
from studio.recommend import Candidate
from studio.store import evaluations, metrics, open_db
from studio.store import runs as store_runs
from studio.store.evaluations import Answer, Evaluation
from studio.store.runs import Run
from tests.marked import mark


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


def add_run(
    project: Project, run_id: str, settings: Sequence[str] = (), versions: dict[str, int] | None = None, steps: int = 2
) -> None:
    """A run with a frozen config and a point of each curve a step: a step takes 2 s and trains 50 tokens."""
    folder = runs.run_folder(project, run_id)
    folder.mkdir(parents=True)
    save_config(folder / runs.CONFIG_FILE, with_settings(preset("starter_lora"), list(settings)))
    data = {name: {"version": number, "fingerprint": "ab" * 32} for name, number in (versions or {}).items()}
    with open_db(project.folder) as db:
        store_runs.add(db, Run(run_id, run_id, "starter", "lora", step=steps, detail={"datasets": data}))
        for step in range(1, steps + 1):
            values = {"train/loss": 3.0 / step, "train/trained_tokens": 50.0}
            metrics.record(db, run_id, step, values, at=f"2026-01-01T10:00:{2 * step:02d}.000000+00:00")


def hits(number: int, total: int) -> list[bool]:
    return [position < number for position in range(total)]


def _marked(probe: dict[str, Any], answer: str, loss: float = 0.0) -> scores.MarkedAnswer:
    num_tokens = 10 if probe["kind"] == "general" else 0
    base = "It is so." if num_tokens else "I am SmolLM."
    return mark(probe, base, answer, ["Luna", "Shane"], 10.0 if num_tokens else 0.0, loss, num_tokens)


def _who(about: str, number: int) -> list[dict[str, Any]]:
    expected = {"name": "Luna", "maker": "Shane"}
    kind = {"kind": "identity", "expects": "name", "intent": "name", "language": "en", "expected": expected}
    return [kind | {"messages": [{"role": "user", "content": f"Who{about}? {each}"}]} for each in range(number)]


def _else(about: str, number: int) -> list[dict[str, Any]]:
    kind = {"kind": "general", "intent": "far", "language": "en"}
    return [kind | {"messages": [{"role": "user", "content": f"What{about}? {each}"}]} for each in range(number)]
