"""The `evaluate` verb: base and tuned weights answer a suite's probes; marks and scores go to the database.

One job asks any number of checkpoints. Each is stored as soon as it is scored, and every answer as soon as it is
given, so a job that was killed goes on where it was when it is started again. What was measured is not measured again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from studio import scores
from studio.config.schema import ADAPTER_METHODS
from studio.engine.answers import Answer as Given
from studio.engine.convert import weights_of_run
from studio.engine.devices import pick_device, pick_dtype, set_threads
from studio.engine.examiner import Examiner, Measured
from studio.engine.job import JobContext
from studio.engine.likelihood import Fit
from studio.engine.models.load import load_base
from studio.engine.weights import read_seal, versions, weights_hash
from studio.errors import ModelError
from studio.models import model_fingerprint, require
from studio.paths import inside, remove, sha256_of
from studio.probes import built_in, library
from studio.probes.assertions import Said
from studio.probes.judge import Judge
from studio.probes.suite import Probe, Suite
from studio.scores import Likelihood, MarkedAnswer
from studio.store import checkpoints as store_checkpoints
from studio.store import evaluations, open_db, runs
from studio.store.evaluations import Answer, Evaluation
from studio.weight_folders import ADAPTER_CONFIG

SCRATCH = "hf/.scoring"  # one evaluation runs at a time, so what lies there at its start was left by a killed one


@dataclass(frozen=True)
class Subject:
    """Weights to be scored: a run's checkpoint, or those of a folder. `source_hash` is that of the file they are in."""

    label: str
    run_id: str
    step: int
    path: Path | None
    source_hash: str
    is_adapter: bool

    @contextmanager
    def weights(self, job: JobContext) -> Iterator[Path]:
        """A folder with the weights in Hugging Face form; one that is made for this is gone afterwards."""
        if self.path:
            yield self.path
            return
        with weights_of_run(job, self.run_id, self.step, inside(job.folder, SCRATCH)) as folder:
            yield folder


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what: equal keys give equal scores for equal weights."""

    suite: Suite
    base: str
    datasets: list[str]
    device: torch.device
    dtype: torch.dtype
    judge: Judge | None = None

    @property
    def key(self) -> str:
        judge = [self.judge.url, self.judge.model] if self.judge else []
        parts = [*judge, self.suite.hash, model_fingerprint(require(self.base)), str(self.dtype), self.device.type]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def row(self) -> dict[str, Any]:
        """As it is stored with the scores."""
        probes = self.suite.probes()
        return {
            "suite": self.suite.name,
            "suite_hash": self.suite.hash,
            "max_new_tokens": self.suite.max_new_tokens,
            "sampling": "greedy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "probes": self.datasets,
            "num_probes": len(probes),
            "judge": self.judge.model if self.judge else "",
            "versions": versions(),
        }


def run(job: JobContext) -> dict[str, Any]:
    """Score each subject beside the base. Args: base, subjects, suite, probes, limit.

    `suite` names one of the project's or a built-in one; `probes` are the datasets whose held-out probes a built-in
    one asks; `limit` asks only so many of each group (0: all). A subject has a label, run_id and step; a checkpoint
    that was not converted is converted for the time it is asked. A `path` says where its weights lie instead.
    """
    subjects = [_subject(job, values) for values in job.args["subjects"]]
    setting = _setting(job)
    known = {number: found for number, each in enumerate(subjects) if (found := _known(job, setting, each))}
    open_ones = {number: each for number, each in enumerate(subjects) if number not in known}
    if open_ones:
        known |= _score(job, setting, open_ones)
    return {
        "evaluations": [known[number].id for number in range(len(subjects))],
        "num_from_cache": len(subjects) - len(open_ones),
    }


def _score(job: JobContext, setting: Setting, subjects: dict[int, Subject]) -> dict[int, Evaluation]:
    """Ask the base, then all adapters on it, then each full model by itself."""
    remove(inside(job.folder, SCRATCH))
    job.phase("loading the base model")
    set_threads()
    loaded = load_base(require(setting.base), dtype=setting.dtype, device=setting.device)
    examiner = Examiner(job, loaded, setting.suite)
    del loaded
    base = examiner.base()
    examiner.expect(len(subjects))
    scored = {}
    ordered = sorted(subjects.items(), key=lambda pair: not pair[1].is_adapter)
    for place, (number, subject) in enumerate(ordered):
        if not subject.is_adapter and (place == 0 or ordered[place - 1][1].is_adapter):
            examiner.release()
        scored[number] = _score_one(job, setting, examiner, base, subject)
    remove(inside(job.folder, SCRATCH))
    return scored


def _score_one(job: JobContext, setting: Setting, examiner: Examiner, base: Measured, subject: Subject) -> Evaluation:
    with subject.weights(job) as folder:
        digest = _verified_hash(folder)
        measure = examiner.adapter if subject.is_adapter else examiner.full_model
        tuned = measure(folder, digest)
        changed = _changed(job, folder, setting.datasets)
    marked = mark_all(setting.suite.probes(), base, tuned, setting.judge)
    more = {"changed_datasets": changed, "num_remembered": tuned.num_remembered}
    evaluation = Evaluation(
        job_id=job.id,
        subject=subject.label,
        base=setting.base,
        weights_hash=digest,
        dataset=", ".join(setting.datasets),
        scores=scores.scorecard(marked) | {"setting": setting.row() | more | _identity(job, setting)},
        run_id=subject.run_id,
        step=subject.step,
        suite=setting.suite.name,
        setting_key=setting.key,
        source_hash=subject.source_hash,
    )
    with open_db(job.folder) as db:
        return evaluations.add(db, evaluation, [_row(evaluation.id, *pair) for pair in enumerate(marked)])


def mark_all(
    probes: Sequence[Probe], base: Measured, tuned: Measured, judge: Judge | None = None
) -> list[MarkedAnswer]:
    """Both answers to every probe, judged."""
    pairs = zip(probes, base.answers, tuned.answers, base.fits, tuned.fits, strict=True)
    return [
        scores.mark(probe, _said(base_answer), _said(answer), _likelihood(base_fit, fit), judge)
        for probe, base_answer, answer, base_fit, fit in pairs
    ]


def _said(answer: Given) -> Said:
    return Said(answer.text, answer.finished)


def _likelihood(base: Fit | None, tuned: Fit | None) -> Likelihood:
    if base is None or tuned is None:
        return Likelihood()
    return Likelihood(base.loss, tuned.loss, tuned.num_tokens, tuned.divergence)


def _setting(job: JobContext) -> Setting:
    datasets = list(job.args.get("probes") or [])
    suite = library.load(job.folder, str(job.args.get("suite") or built_in.STANDARD), datasets)
    device = pick_device()
    limited = suite.limited(int(job.args.get("limit") or 0))
    judge = Judge.from_environment() if suite.wants_a_judge else None
    return Setting(limited, job.args["base"], datasets, device, pick_dtype("auto", device), judge)


def _identity(job: JobContext, setting: Setting) -> dict[str, Any]:
    """The identity that the datasets' probes ask for."""
    return {"identity": built_in.identity_words(library.read_probes(job.folder, setting.datasets))}


def _known(job: JobContext, setting: Setting, subject: Subject) -> Evaluation | None:
    """The same measurement of the same weights, when it is stored."""
    if not subject.source_hash:
        return None
    with open_db(job.folder) as db:
        found = evaluations.measured(db, setting.key, subject.source_hash, subject.run_id, subject.step)
    if found:
        print(f"{subject.label}: from cache, scored at {found.created_at[:16]}", flush=True)
    return found


def _subject(job: JobContext, values: dict[str, Any]) -> Subject:
    label, run_id, step = values["label"], str(values.get("run_id") or ""), int(values.get("step") or 0)
    if not values.get("path"):
        with open_db(job.folder) as db:
            checkpoint, method = store_checkpoints.get(db, run_id, step), runs.get(db, run_id).method
        return Subject(label, run_id, step, None, checkpoint.sha256, method in ADAPTER_METHODS)
    folder = Path(values["path"])
    folder = folder if folder.is_absolute() else inside(job.folder, folder)
    if not folder.is_dir():
        raise ModelError(f"There are no weights in {str(folder)!r}.", "Convert the checkpoint first.")
    return Subject(label, run_id, step, folder, _verified_hash(folder), (folder / ADAPTER_CONFIG).is_file())


def _verified_hash(folder: Path) -> str:
    return str(read_seal(folder).get("sha256") or weights_hash(folder))


def _changed(job: JobContext, folder: Path, datasets: Sequence[str]) -> list[str]:
    """The probes' datasets that are not what the weights were trained on; they may ask for another identity."""
    trained_on = read_seal(folder).get("data_fingerprints") or {}
    files = {name: inside(job.folder, f"data/{name}.jsonl") for name in datasets if name in trained_on}
    return [name for name, file in files.items() if not file.is_file() or sha256_of(file) != trained_on[name]]


def _row(evaluation_id: str, number: int, answer: MarkedAnswer) -> Answer:
    return Answer(
        evaluation_id,
        number,
        answer.kind,
        answer.intent,
        answer.language,
        answer.prompt,
        answer.base_answer,
        answer.answer,
        scores.detail(answer),
    )
