"""A run of a project made into a bundle. The same run gives the same bytes, whenever and wherever it is written."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio import checkpoint_files, datasets, models, runs
from studio.bundles.archive import write_zip
from studio.bundles.content import (
    ANSWERS,
    CONFIG,
    FORMAT,
    MANIFEST,
    METRICS,
    README,
    SAMPLES,
    Began,
    Data,
    File,
    Manifest,
    Numbers,
    Outside,
    RunFacts,
    Scorecard,
    Setting,
    scores_of,
    suite_file,
)
from studio.bundles.readme import commands, readme
from studio.config.schema import ZERO_PRESETS, RunConfig
from studio.config.yaml import update_text
from studio.data.intake import HUB_PREFIXES
from studio.data.tokens import fingerprint
from studio.errors import BundleError, DataError, JobError
from studio.paths import sha256_of, typed_path
from studio.probes.library import own_names, suite_path
from studio.probes.reading import load_suite
from studio.projects import Project
from studio.store import dataset_versions, evaluations, metrics, open_db, samples
from studio.store import jobs as store_jobs
from studio.store.datasets import Version
from studio.store.evaluations import STANDARD, Evaluation
from studio.store.runs import Run

OF_THIS_MACHINE = ("raw", "source")  # parts of a dataset's origin that are places in its project

SAID_OF_A_PROBE = ("probe", "kind", "intent", "language", "prompt", "base_answer", "answer")


@dataclass(frozen=True)
class Packed:
    """What was written, and where."""

    path: Path
    size_bytes: int
    sha256: str
    manifest: Manifest


def pack(project: Project, run_id: str, out: Path, rows: bool = True) -> Packed:
    """Write a run's bundle to `out`. Without `rows`, what was said about them stays out too: probes, answers, samples.

    Scorecards of all suites go in. A suite of the project's own that has changed since it was asked stays out: its
    scorecard then stands alone. Raises BundleError for a run that has not ended or was not trained here, DataError when
    its rows are gone.
    """
    run = _ended_run(project, run_id)
    config = runs.run_config(project, run_id)
    cards = _newest_scorecards(project, run_id)
    sets = _datasets(project, run, config, cards)
    contents: dict[str, bytes | Path] = {
        CONFIG: _portable_config(project, run_id, config).encode(),
        METRICS: _as_json(_numbers(project, run_id)),
    }
    if rows:
        contents |= _rows(project, sets) | _said(project, run_id, cards) | _suites(project, cards)
    manifest = _manifest(project, run, config, cards, [_described(each, contents) for each in sets])
    contents[README] = readme(manifest).encode()
    manifest = manifest.model_copy(update={"files": {name: _file(content) for name, content in contents.items()}})
    contents[MANIFEST] = _as_json(manifest.model_dump(mode="json"))
    write_zip(out, contents)
    return Packed(out, out.stat().st_size, sha256_of(out), manifest)


def _ended_run(project: Project, run_id: str) -> Run:
    run = runs.get_run(project, run_id)
    if "imported" in run.detail or run.state in store_jobs.LIVE_STATES or not run.step:
        state = "it was trained elsewhere" if "imported" in run.detail else f"it is {run.state or 'not started'}"
        raise BundleError(
            f"Run {run_id} cannot be bundled: {state}, at step {run.step}.",
            "A bundle is made of a run that has ended here.",
        )
    return run


def _newest_scorecards(project: Project, run_id: str) -> list[tuple[Evaluation, int]]:
    """(scorecard, limit of its probes): the newest of each suite and step; the standard suite first, by step."""
    with open_db(project.folder) as db:
        suites = evaluations.suites_of_run(db, run_id)
        return [(each, _limit(db, each)) for suite in suites for each in evaluations.of_run(db, run_id, suite)]


def _limit(db: Any, evaluation: Evaluation) -> int:
    try:
        return int(store_jobs.get(db, evaluation.job_id).args.get("limit") or 0)
    except JobError:  # made by hand, or its job was deleted
        return 0


def _datasets(
    project: Project, run: Run, config: RunConfig, cards: Sequence[tuple[Evaluation, int]]
) -> list[tuple[Version, bool]]:
    """(version, whether the run learned from it), by name: the run's sources as they were, and what was asked about."""
    known = run.detail.get("datasets", {})
    asked = {name for card, _ in cards for name in _asked(card)}
    found = []
    for name in sorted({*config.data.sources, *asked}):
        versions = datasets.versions(project, name)
        number = known.get(name, {}).get("version", versions[0].number)
        found.append((next(each for each in versions if each.number == number), name in config.data.sources))
    return found


def _asked(card: Evaluation) -> list[str]:
    return [name for name in card.dataset.split(", ") if name]


def _rows(project: Project, sets: Sequence[tuple[Version, bool]]) -> dict[str, bytes | Path]:
    """Files of the rows and of the probes. Raises DataError when the rows are not those that were registered."""
    files: dict[str, bytes | Path] = {}
    for version, _ in sets:
        place = (project.folder, version.dataset, version.number)
        if fingerprint(dataset_versions.stream(*place)) != version.fingerprint:
            raise DataError(
                f"Dataset {version.dataset!r}, version {version.number}, is not what it was: its file was changed.",
                "Put the file back as it was, or bundle the run without its rows.",
            )
        files[f"data/{version.dataset}.jsonl"] = dataset_versions.rows_file(*place)
        if probes := dataset_versions.probes_file(*place):
            files[f"data/{version.dataset}.probes.jsonl"] = probes
    return files


def _said(project: Project, run_id: str, cards: Sequence[tuple[Evaluation, int]]) -> dict[str, bytes | Path]:
    """What the models said: samples on the way, and the answers behind the scorecards."""
    with open_db(project.folder) as db:
        said = [[each.step, each.prompt, each.text, each.error] for each in samples.listed(db, run_id)]
        answers = [
            [card.suite or STANDARD, card.step, *(getattr(each, name) for name in SAID_OF_A_PROBE)]
            for card, _ in cards
            for each in evaluations.answers(db, card.id)
        ]
    files = {SAMPLES: _as_lines(said), ANSWERS: _as_lines(answers)}
    return {name: content for name, content in files.items() if content}


def _suites(project: Project, cards: Sequence[tuple[Evaluation, int]]) -> dict[str, bytes | Path]:
    """Files of the project's own suites, where they still ask what they asked."""
    return {
        suite_file(card.suite): suite_path(project.folder, card.suite)
        for card, limit in cards
        if card.suite in own_names(project.folder)
        and load_suite(suite_path(project.folder, card.suite)).limited(limit).hash == _suite_hash(card)
    }


def _suite_hash(card: Evaluation) -> str:
    return str(card.scores.get("setting", {}).get("suite_hash", ""))


def _described(each: tuple[Version, bool], contents: Mapping[str, object]) -> Data:
    version, learned = each
    file, probes = f"data/{version.dataset}.jsonl", f"data/{version.dataset}.probes.jsonl"
    origin = {key: value for key, value in version.origin.items() if key not in OF_THIS_MACHINE}
    return Data(
        name=version.dataset,
        kind=version.kind or "import",
        version=version.number,
        fingerprint=version.fingerprint,
        num_rows=version.num_rows,
        num_probes=version.num_probes,
        origin=origin if file in contents else {},
        learned=learned,
        file=file if file in contents else "",
        probes_file=probes if probes in contents else "",
    )


def _manifest(
    project: Project,
    run: Run,
    config: RunConfig,
    cards: Sequence[tuple[Evaluation, int]],
    sets: Sequence[Data],
) -> Manifest:
    """All of it but the list of files."""
    with open_db(project.folder) as db:
        result = store_jobs.get(db, run.job_id).result
    began = [Began(step=each["step"], circumstances=each["circumstances"]) for each in run.detail.get("began", [])]
    base = shown_base(config.model.base)
    return Manifest(
        format=FORMAT,
        run=RunFacts(
            id=run.id,
            method=run.method,
            created_at=run.created_at,
            state=run.state,
            step=run.step,
            num_steps=run.num_steps,
            learned_sha256=result.get("weights_sha256") or "",
            started_despite=tuple(run.detail.get("started_despite", ())),
        ),
        base=base,
        base_fingerprint=_base_fingerprint(config, began),
        seed=config.train.seed,
        began=tuple(began),
        datasets=tuple(sets),
        outside=tuple(_outside(config)),
        scorecards=tuple(_scorecard(*card, with_words=any(each.file for each in sets)) for card in cards),
        commands=tuple(commands(run.id, base, _is_folder(config.model.base), sets)),
        files={},
    )


def _base_fingerprint(config: RunConfig, began: Sequence[Began]) -> str:
    """As the run noted it; as it is now for a run of an earlier version, which noted nothing."""
    noted = began[-1].circumstances.get("base") if began else None
    return noted or models.model_fingerprint(models.require(config.model.base))


def _scorecard(card: Evaluation, limit: int, with_words: bool) -> Scorecard:
    """Without rows, the names that the questions ask for stay out too."""
    setting = card.scores.get("setting", {})
    return Scorecard(
        suite=card.suite or STANDARD,
        step=card.step,
        datasets=tuple(_asked(card)),
        limit=limit,
        scores=scores_of(card),
        weights_sha256=card.weights_hash,
        setting=setting if with_words else {key: value for key, value in setting.items() if key != "identity"},
    )


def _portable_config(project: Project, run_id: str, config: RunConfig) -> str:
    """The frozen config, comments and all, with names in the place of paths: where things lie is nobody's business."""
    values = config.model_dump(mode="json")
    values["model"]["base"] = shown_base(config.model.base)
    values["model"]["continue_from"] = Path(config.model.continue_from).name
    if config.distributed.strategy == "deepspeed":
        values["distributed"]["deepspeed"] = Path(config.distributed.deepspeed).name
    else:
        del values["distributed"]["deepspeed"]  # not read, and perhaps a file that is nowhere else
    for recipe in values["data"]["recipes"].values():
        if not recipe["source"].startswith(HUB_PREFIXES):
            recipe["source"] = Path(recipe["source"]).name
    text = (runs.run_folder(project, run_id) / runs.CONFIG_FILE).read_text(encoding="utf-8")
    return update_text(text, RunConfig.model_validate(values))


def shown_base(base: str) -> str:
    """A base model as others may see it: of a folder its name alone."""
    return Path(base).name if _is_folder(base) else base


def _is_folder(base: str) -> bool:
    return models.resolve(base).kind == "folder"


def _outside(config: RunConfig) -> Iterator[Outside]:
    """What the config names and the bundle does not hold. Raises BundleError when it is gone: nothing can name it."""
    named: dict[Setting, str] = {}
    if config.model.continue_from:
        named["model.continue_from"] = config.model.continue_from
    if config.distributed.strategy == "deepspeed" and config.distributed.deepspeed not in ZERO_PRESETS:
        named["distributed.deepspeed"] = config.distributed.deepspeed
    for setting, text in named.items():
        path = typed_path(text)
        if not path.exists():
            raise BundleError(f"The run began with {str(path)!r}, which is gone.", "Put it back to where it was.")
        yield Outside(setting=setting, name=path.name, sha256=checkpoint_files.measure(path)["sha256"])


def _numbers(project: Project, run_id: str) -> Numbers:
    with open_db(project.folder) as db:
        return {
            name: [(point.step, point.value) for point in metrics.series(db, run_id, name)]
            for name in metrics.names(db, run_id)
        }


def _file(content: bytes | Path) -> File:
    if isinstance(content, Path):
        return File(size_bytes=content.stat().st_size, sha256=sha256_of(content))
    return File(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1).encode() + b"\n"


def _as_lines(values: Iterable[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
