"""Scorecards: what base and tuned weights answered to the probes, and the scores computed from that."""

from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import StudioError
from studio.store.records import new_id, now, select, to_row, writing


@dataclass
class Evaluation:
    """Scores of one set of weights (`subject`, a label) beside its base, on the probes of `dataset`."""

    job_id: str
    subject: str
    base: str
    weights_hash: str
    dataset: str
    scores: dict[str, Any]
    run_id: str = ""
    step: int = 0
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)


@dataclass
class Answer:
    """What base and tuned model said to one probe; `detail` holds the marks."""

    evaluation_id: str
    probe: int
    kind: str
    intent: str
    language: str
    prompt: str
    base_answer: str
    answer: str
    detail: dict[str, Any] = field(default_factory=dict)


def add(db: Database, evaluation: Evaluation, answers: list[Answer]) -> Evaluation:
    with writing(db):
        db.table("evaluations").insert(to_row(evaluation))
        db.table("answers").insert_all([to_row(answer) for answer in answers])
    return evaluation


def listed(db: Database) -> list[Evaluation]:
    """All evaluations, newest first."""
    return select(db, Evaluation, "select * from evaluations order by created_at desc")


def get(db: Database, evaluation_id: str) -> Evaluation:
    found = select(db, Evaluation, "select * from evaluations where id = ?", [evaluation_id])
    if not found:
        raise StudioError(f"There is no evaluation {evaluation_id!r}.", "The Compare page lists what there is.")
    return found[0]


def answers(db: Database, evaluation_id: str) -> list[Answer]:
    return select(db, Answer, "select * from answers where evaluation_id = ? order by probe", [evaluation_id])
