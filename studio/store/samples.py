"""Text that a model generated while it was trained."""

from dataclasses import dataclass, field

from sqlite_utils import Database

from studio import faults
from studio.store.records import now, select, to_row, writing


@dataclass
class Sample:
    """What the model of `step` (0 is before training) said to `prompt`; `error` when it could not be made."""

    run_id: str
    step: int
    prompt: str
    text: str = ""
    error: str = ""
    at: str = field(default_factory=now)


def add(db: Database, samples: list[Sample]) -> None:
    """Store the samples of one step in place of any stored before for that step."""
    if not samples:
        return
    with writing(db):
        db.execute("delete from samples where run_id = ? and step = ?", [samples[0].run_id, samples[0].step])
        db.table("samples").insert_all([to_row(sample) for sample in samples])
        faults.hit("commit samples")
    faults.hit("end samples")


def listed(db: Database, run_id: str) -> list[Sample]:
    return select(db, Sample, "select * from samples where run_id = ? order by step, id", [run_id])
