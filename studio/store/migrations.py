"""The schema, as an append-only list of steps. Never edit a step that has been released; add one."""

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations


class _Migrations(Migrations):
    def all(self) -> list[Migrations._Migration]:
        return list(self._migrations)


migrations = _Migrations("studio")


@migrations()
def m001_initial(db: Database) -> None:
    db.table("jobs").create(
        {
            "id": str, "kind": str, "title": str, "state": str, "phase": str, "cause": str,
            "run_id": str, "needs_device": int, "args_json": str, "result_json": str,
            "current": int, "total": int, "unit": str,
            "created_at": str, "started_at": str, "finished_at": str, "heartbeat_at": str,
            "pid": int, "process_created": float, "log_path": str,
            "stop_request": str, "save_request": int, "sample_request": int,
        },
        pk="id",
    )  # fmt: skip
    db.table("jobs").create_index(["state"])
    db.table("runs").create(
        {
            "id": str, "name": str, "base": str, "method": str, "job_id": str, "created_at": str,
            "num_steps": int, "step": int, "detail_json": str, "archived_at": str,
        },
        pk="id",
    )  # fmt: skip
    db.table("metrics").create(
        {"run_id": str, "name": str, "step": int, "value": float, "at": str}, pk=("run_id", "name", "step")
    )
    db.table("samples").create(
        {"id": int, "run_id": str, "step": int, "prompt": str, "text": str, "error": str, "at": str}, pk="id"
    )
    db.table("samples").create_index(["run_id", "step"])
    db.table("datasets").create(
        {
            "name": str, "kind": str, "path": str, "fingerprint": str, "num_rows": int, "num_probes": int,
            "origin_json": str, "created_at": str,
        },
        pk="name",
    )  # fmt: skip
    db.table("checkpoints").create(
        {"run_id": str, "step": int, "path": str, "sha256": str, "size_bytes": int, "created_at": str},
        pk=("run_id", "step"),
    )
    db.table("outputs").create(
        {
            "id": str, "kind": str, "path": str, "run_id": str, "step": int, "detail_json": str, "created_at": str,
        },
        pk="id",
    )  # fmt: skip
    db.table("evaluations").create(
        {
            "id": str, "job_id": str, "subject": str, "run_id": str, "step": int, "base": str, "weights_hash": str,
            "dataset": str, "scores_json": str, "created_at": str,
        },
        pk="id",
    )  # fmt: skip
    db.table("answers").create(
        {
            "evaluation_id": str, "probe": int, "kind": str, "intent": str, "language": str,
            "prompt": str, "base_answer": str, "answer": str, "detail_json": str,
        },
        pk=("evaluation_id", "probe"),
    )  # fmt: skip


@migrations()
def m002_dataset_versions(db: Database) -> None:
    """What there is becomes version 1."""
    db.table("datasets").add_column("version", int, not_null_default=1)
    db.table("dataset_versions").create(
        {
            "dataset": str, "number": int, "fingerprint": str, "num_rows": int, "num_probes": int, "kind": str,
            "origin_json": str, "made_by": str, "parent": int, "same_rows_as": int, "created_at": str,
        },
        pk=("dataset", "number"),
    )  # fmt: skip
    db.execute(
        "insert into dataset_versions select name, 1, fingerprint, num_rows, num_probes, kind, origin_json,"
        " 'made before versions were kept', 0, 0, created_at from datasets"
    )
    db.table("lint_results").create(
        {"key": str, "dataset": str, "summary_json": str, "findings_json": str, "created_at": str}, pk="key"
    )


@migrations()
def m003_events_queue_and_best(db: Database) -> None:
    """What happened to a run in words; a place in the queue; which checkpoint is the best one."""
    db.table("run_events").create(
        {"id": int, "run_id": str, "step": int, "kind": str, "detail_json": str, "at": str}, pk="id"
    )
    db.table("run_events").create_index(["run_id", "step"])
    for name, kind in {
        "place": float, "held": int, "starts": int, "start_at": str, "boot_id": str, "oom_kills": int
    }.items():  # fmt: skip
        db.table("jobs").add_column(name, kind)
    for name, kind in {"is_best": int, "score": float, "score_name": str}.items():
        db.table("checkpoints").add_column(name, kind)


@migrations()
def m004_chats(db: Database) -> None:
    """Chats with base and tuned weights side by side: turns form a tree, each with a reply of every column."""
    db.table("chats").create(
        {
            "id": str, "title": str, "base": str, "labels_json": str, "leaf": str,
            "created_at": str, "updated_at": str,
        },
        pk="id",
    )  # fmt: skip
    db.table("turns").create(
        {
            "id": str, "chat_id": str, "parent": str, "question": str, "system": str, "models_json": str, "blind": int,
            "created_at": str,
        },
        pk="id",
    )  # fmt: skip
    db.table("turns").create_index(["chat_id"])
    db.table("replies").create(
        {
            "turn_id": str, "model": str, "text": str, "ended_by": str, "error": str, "proof_json": str,
            "num_tokens": int, "seconds": float, "first_token_seconds": float,
        },
        pk=("turn_id", "model"),
    )  # fmt: skip
    db.table("votes").create(
        {"turn_id": str, "chat_id": str, "choice": str, "model": str, "models_json": str, "created_at": str},
        pk="turn_id",
    )


@migrations()
def m005_evaluations_of_suites(db: Database) -> None:
    """Which suite was asked and how, and which weights by their file: what was measured is not measured again."""
    for name in ("suite", "setting_key", "source_hash"):
        db.table("evaluations").add_column(name, str)
    db.table("evaluations").create_index(["setting_key", "source_hash"])
