"""What a project knows of weights that leave it: scores that were measured on them, and versions of their data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from studio.errors import JobError
from studio.store import evaluations, open_db, runs
from studio.store.evaluations import Evaluation


@dataclass(frozen=True)
class Lineage:
    """`scorecard`: the newest standard one of these weights, None where they were not scored.

    `data`: name of a dataset -> its version and fingerprint in words.
    """

    scorecard: Evaluation | None = None
    data: Mapping[str, str] = field(default_factory=dict)


def lineage_of(project: Path, seal: Mapping[str, Any], weights_hash: str) -> Lineage:
    """Of the weights with that hash, whose folder says `seal`; without a project only the fingerprints are known."""
    run_id, fingerprints = str(seal.get("run_id") or ""), dict(seal.get("data_fingerprints") or {})
    if not (project / "project.json").is_file():
        return Lineage(data=_in_words(fingerprints, {}))
    with open_db(project) as db:
        scorecard = evaluations.newest_standard(db, run_id, int(seal.get("step") or 0), weights_hash)
        frozen = _frozen(db, run_id)
    return Lineage(scorecard, _in_words(fingerprints, frozen))


def _frozen(db: Database, run_id: str) -> dict[str, Any]:
    """The dataset versions that a run noted when it was started; {} for one that came from elsewhere."""
    try:
        return dict(runs.get(db, run_id).detail.get("datasets") or {})
    except JobError:
        return {}


def _in_words(fingerprints: Mapping[str, str], frozen: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The version is told only where the run noted it for this very fingerprint."""
    same = {name: frozen.get(name, {}).get("fingerprint") == digest for name, digest in fingerprints.items()}
    return {
        name: f"version {frozen[name]['version']}, sha256 {digest}" if same[name] else f"sha256 {digest}"
        for name, digest in fingerprints.items()
    }
