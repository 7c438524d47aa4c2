"""What happened to a run besides its numbers: bad steps, less memory, a full disk, a resume, an early stop."""

from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from studio.store.records import now, select, to_row, writing

KINDS = (
    "resumed", "weights_only", "passed_over", "rows_missing", "bad_step", "smaller_micro_batch", "save_put_off",
    "early_stop", "valid_not_finite", "spread_anew", "computed_twice",
)  # fmt: skip


@dataclass
class RunEvent:
    """`kind` is one of KINDS; `detail` has the numbers and names that its sentence needs."""

    run_id: str
    step: int
    kind: str
    detail: dict[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=now)


def add(db: Database, event: RunEvent) -> None:
    with writing(db):
        db.table("run_events").insert(to_row(event))


def listed(db: Database, run_id: str) -> list[RunEvent]:
    """In the order in which they happened."""
    return select(db, RunEvent, "select * from run_events where run_id = ? order by id", [run_id])
