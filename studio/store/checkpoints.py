"""Checkpoints of runs, and what was made from them: Hugging Face folders, merged models, exports, reports."""

from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.errors import CheckpointError
from studio.store.records import new_id, now, select, to_row, writing


@dataclass
class Checkpoint:
    """All that is needed to resume after `step`. `path` is relative to the project.

    `is_best`: the best one of its run so far, by `score_name` (valid_loss, probe_score), with `score`.
    """

    run_id: str
    step: int
    path: str
    sha256: str
    size_bytes: int
    created_at: str = field(default_factory=now)
    is_best: int = 0
    score: float | None = None
    score_name: str = ""


@dataclass
class Output:
    """Something made from a checkpoint. `kind` is hf, merged, export or report; `path` is relative to the project."""

    kind: str
    path: str
    run_id: str = ""
    step: int = 0
    detail: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=new_id)
    created_at: str = field(default_factory=now)


def put(db: Database, checkpoint: Checkpoint) -> Checkpoint:
    db.table("checkpoints").insert(to_row(checkpoint), replace=True)
    return checkpoint


def listed(db: Database, run_id: str = "") -> list[Checkpoint]:
    """Checkpoints of a run (of all runs by default), newest step first."""
    sql = "select * from checkpoints where ? = '' or run_id = ? order by created_at desc, step desc"
    return select(db, Checkpoint, sql, [run_id, run_id])


def get(db: Database, run_id: str, step: int) -> Checkpoint:
    """Raises CheckpointError, naming the steps there are."""
    found = [checkpoint for checkpoint in listed(db, run_id) if checkpoint.step == step]
    if not found:
        steps = ", ".join(str(checkpoint.step) for checkpoint in listed(db, run_id)) or "none yet"
        raise CheckpointError(f"Run {run_id} has no checkpoint at step {step}.", f"There are: {steps}.")
    return found[0]


def mark_best(db: Database, run_id: str, step: int, score_name: str, score: float) -> None:
    """The checkpoint of this step is the best one of its run, and no other is; nothing changes while there is none."""
    with writing(db):
        if not db.execute("select 1 from checkpoints where run_id = ? and step = ?", [run_id, step]).fetchone():
            return
        db.execute("update checkpoints set is_best = 0 where run_id = ?", [run_id])
        sql = "update checkpoints set is_best = 1, score_name = ?, score = ? where run_id = ? and step = ?"
        db.execute(sql, [score_name, score, run_id, step])


def remove(db: Database, run_id: str, step: int) -> None:
    with writing(db):
        db.execute("delete from checkpoints where run_id = ? and step = ?", [run_id, step])


def put_output(db: Database, output: Output) -> Output:
    """Register an output, in place of one at the same path."""
    with writing(db):
        db.execute("delete from outputs where path = ?", [output.path])
        db.table("outputs").insert(to_row(output))
    return output


def outputs(db: Database, kind: str = "") -> list[Output]:
    """Outputs of a kind (all by default), newest first."""
    return select(db, Output, "select * from outputs where ? = '' or kind = ? order by created_at desc", [kind, kind])
