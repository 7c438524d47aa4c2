"""Numbers over steps. Names are `group/name`, as train/loss; a step is an optimizer update, counted from 1."""

import math
from dataclasses import dataclass

from sqlite_utils import Database

from studio import faults
from studio.store.records import now, writing


@dataclass(frozen=True)
class Point:
    step: int
    value: float | None
    at: str


def record(db: Database, run_id: str, step: int, values: dict[str, float], at: str = "") -> None:
    """Store one step's numbers in place of any stored before for it. NaN and Inf become NULL: a gap."""
    at = at or now()
    rows = [
        {
            "run_id": run_id,
            "name": name,
            "step": step,
            "value": value if math.isfinite(value) else None,
            "at": at,
        }
        for name, value in values.items()
    ]
    with writing(db):
        db.table("metrics").insert_all(rows, replace=True)
        faults.hit("commit metrics")
    faults.hit("end metrics")


def series(db: Database, run_id: str, name: str, after_step: int = -1) -> list[Point]:
    """All points of one metric after a step, in order."""
    sql = "select step, value, at from metrics where run_id = ? and name = ? and step > ? order by step"
    return [Point(**row) for row in db.query(sql, [run_id, name, after_step])]


def names(db: Database, run_id: str) -> list[str]:
    return [
        row["name"] for row in db.query("select distinct name from metrics where run_id = ? order by name", [run_id])
    ]


def latest(db: Database, run_id: str) -> dict[str, float]:
    """The newest value of every metric of a run."""
    sql = "select name, value, max(step) from metrics where run_id = ? and value is not null group by name"
    return {row["name"]: row["value"] for row in db.query(sql, [run_id])}


def forget_after(db: Database, run_id: str, step: int) -> None:
    """Drop what was stored after a step: a resumed run computes it again."""
    with writing(db):
        db.execute("delete from metrics where run_id = ? and step > ?", [run_id, step])
        db.execute("delete from samples where run_id = ? and step > ?", [run_id, step])
        # An early stop is told again, if it comes to it, by whoever goes on from that very step.
        sql = "delete from run_events where run_id = ? and (step > ? or kind = 'early_stop')"
        db.execute(sql, [run_id, step])


def count(db: Database, run_id: str, up_to_step: int) -> dict[str, int]:
    """{"metrics", "samples"}: rows of a run up to a step."""
    sql = "select count(*) from {} where run_id = ? and step <= ?"
    return {name: db.execute(sql.format(name), [run_id, up_to_step]).fetchone()[0] for name in ("metrics", "samples")}
