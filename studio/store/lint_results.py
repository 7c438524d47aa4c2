"""What a check of a dataset found, kept so that a start need not look at every row again."""

import json
from dataclasses import asdict

from sqlite_utils import Database

from studio.data.lint.findings import Finding, LintResult
from studio.store.records import now, writing

KEPT_RESULTS = 100


def find(db: Database, key: str) -> LintResult | None:
    """The result of a check, None when it was not made. `key` says of what, by which rules."""
    for row in db.query("select summary_json, findings_json from lint_results where key = ?", [key]):
        findings = [Finding(**{**each, "others": tuple(each["others"])}) for each in json.loads(row["findings_json"])]
        return LintResult(findings, json.loads(row["summary_json"]))
    return None


def put(db: Database, key: str, dataset: str, result: LintResult) -> None:
    """Keep a result, and only the newest ones."""
    row = {
        "key": key,
        "dataset": dataset,
        "summary_json": json.dumps(result.counts),
        "findings_json": json.dumps([asdict(finding) for finding in result.findings], ensure_ascii=False),
        "created_at": now(),
    }
    with writing(db):
        db.table("lint_results").insert(row, replace=True)
        db.execute(
            "delete from lint_results where key not in (select key from lint_results order by created_at desc limit ?)",
            [KEPT_RESULTS],
        )
