"""Scorecards: what base and tuned weights answered to the probes, and the scores computed from that."""

from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import StudioError
from studio.store.records import new_id, now, select, to_row, writing

STANDARD = "standard"


@dataclass
class Evaluation:
    """Scores of one set of weights (`subject`, a label) beside its base, on the probes of a suite.

    `scores` is what `studio.scores.scorecard` returns, with "setting": how it was measured. `dataset`: whose held-out
    probes a built-in suite asked. `suite` is "" for those that were stored before suites were. `setting_key` stands for
    the suite's content, the base and the number format; `source_hash` is that of the file the weights came from.
    """

    job_id: str
    subject: str
    base: str
    weights_hash: str
    dataset: str
    scores: dict[str, Any]
    run_id: str = ""
    step: int = 0
    suite: str = ""
    setting_key: str = ""
    source_hash: str = ""
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)

    @property
    def is_standard(self) -> bool:
        """Whether it asked for identity, leakage and retention, as the standard suite does."""
        return self.suite in ("", STANDARD)


@dataclass
class Answer:
    """What base and tuned model said to one probe; `detail` holds the marks, as `studio.scores.detail` makes them."""

    evaluation_id: str
    probe: int
    kind: str
    intent: str
    language: str
    prompt: str
    base_answer: str
    answer: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return str(self.detail.get("group") or self.kind)

    @property
    def passed(self) -> bool:
        return bool(self.detail.get("passed", True))

    @property
    def base_passed(self) -> bool:
        return bool(self.detail.get("base_passed", True))

    @property
    def leaked(self) -> bool | None:
        """Whether a general answer says what it must not; None where nothing is forbidden."""
        before_suites = None if self.kind == "identity" else not self.passed
        return self.detail.get("leaked", before_suites)

    @property
    def judged(self) -> bool:
        """Whether there was something to pass that could be decided."""
        return bool(self.detail.get("judged", True))

    @property
    def failed(self) -> bool:
        """Whether it does not hold what it must; an answer that could not be decided did not fail."""
        return self.judged and not self.passed


def add(db: Database, evaluation: Evaluation, answers: list[Answer]) -> Evaluation:
    with writing(db):
        db.table("evaluations").insert(to_row(evaluation))
        db.table("answers").insert_all([to_row(answer) for answer in answers])
    return evaluation


def listed(db: Database) -> list[Evaluation]:
    """All evaluations, newest first."""
    return select(db, Evaluation, "select * from evaluations order by created_at desc")


def of_run(db: Database, run_id: str, suite: str = STANDARD) -> list[Evaluation]:
    """The newest evaluation of each checkpoint of a run by one suite, by step; standard ones as `is_standard` says."""
    found = select(
        db,
        Evaluation,
        "select * from evaluations where run_id = ? and coalesce(nullif(suite, ''), ?) = ? order by created_at",
        [run_id, STANDARD, suite],
    )
    return [newest for _, newest in sorted({each.step: each for each in found}.items())]


def suites_of_run(db: Database, run_id: str) -> list[str]:
    """The suites that checkpoints of a run were scored by: the standard one first, then by name."""
    found = db.execute("select distinct suite from evaluations where run_id = ?", [run_id])
    return sorted({suite or STANDARD for (suite,) in found}, key=lambda suite: (suite != STANDARD, suite))


def measured(db: Database, setting_key: str, source_hash: str, run_id: str, step: int) -> Evaluation | None:
    """The same measurement of the same weights, when it was made before."""
    found = select(
        db,
        Evaluation,
        "select * from evaluations where setting_key = ? and source_hash = ? and run_id = ? and step = ?"
        " order by created_at desc limit 1",
        [setting_key, source_hash, run_id, step],
    )
    return found[0] if found else None


def newest_standard(db: Database, run_id: str, step: int, weights_hash: str) -> Evaluation | None:
    """The newest standard scorecard of a checkpoint: of that step of that run, or of weights with that hash."""
    found = select(
        db,
        Evaluation,
        "select * from evaluations where (run_id != '' and run_id = ? and step = ?) or weights_hash = ?"
        " order by created_at desc",
        [run_id, step, weights_hash],
    )
    return next((each for each in found if each.is_standard), None)


def get(db: Database, evaluation_id: str) -> Evaluation:
    found = select(db, Evaluation, "select * from evaluations where id = ?", [evaluation_id])
    if not found:
        raise StudioError(f"There is no evaluation {evaluation_id!r}.", "The Compare page lists what there is.")
    return found[0]


def answers(db: Database, evaluation_id: str) -> list[Answer]:
    return select(db, Answer, "select * from answers where evaluation_id = ? order by probe", [evaluation_id])
