"""A bundle's run once more: what is here and what is not, told before anything is made; then data, run, scorecards."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from studio import checkpoint_files, datasets, machine, models, runs, suites
from studio.bundles.archive import DAMAGED
from studio.bundles.content import Bundle, Data, Expected, Manifest, suite_file
from studio.config.schema import RunConfig
from studio.data.conversation import Conversation
from studio.data.files import scan
from studio.data.formats import RowProblem, convert_rows, write_conversations
from studio.data.tokens import fingerprint
from studio.errors import BundleError, ConfigError, DataError, ModelError
from studio.paths import atomic_write_text
from studio.probes import library
from studio.probes.built_in import probe_form
from studio.probes.reading import parse_suite
from studio.probes.suite import ProbeForm
from studio.projects import Project, create_project, delete_project, list_projects, open_project
from studio.store import open_db
from studio.store import runs as store_runs
from studio.store.jobs import Job
from studio.store.runs import Run

EXPECTED_FILE = "reproduces.json"  # in the folder of the run that reproduces another
MOST_PROBES_BYTES = 256 * 2**20
MOST_SUITE_BYTES = 2**20
BASE, ROWS = "base", "data."
INSIDE, HERE = "the bundle", "this project"  # where rows come from; else a project's slug, or a file that was given
KINDS_OF_PROBES = ("identity", "general")
IDENTITY = ("name", "maker")


@dataclass(frozen=True)
class Difference:
    """Something that may change the numbers, as it was and as it is here."""

    what: str
    there: str
    here: str


@dataclass(frozen=True)
class Plan:
    """What reproducing would use and make. `missing` says what must be given first, by what it is asked for with.

    `rows`: where each dataset comes from: "the bundle", "this project", a project's slug, or a file.
    """

    project: str
    is_new: bool
    base: str
    rows: dict[str, str]
    outside: dict[str, Path]
    differences: tuple[Difference, ...]
    missing: dict[str, str]


def make_plan(bundle: Bundle, project: Project | None = None, given: Mapping[str, Path] | None = None) -> Plan:
    """Look for all that the run needs; nothing is made. `project` None means a new one.

    `given`: places of what is not in the bundle, by "base", "data.NAME", "model.continue_from" or
    "distributed.deepspeed". Raises BundleError for any other name.
    """
    given, manifest = given or {}, bundle.manifest
    known = {BASE, *(ROWS + data.name for data in manifest.datasets), *(each.setting for each in manifest.outside)}
    if strange := sorted(set(given) - known):
        raise BundleError(f"The bundle asks for no {strange[0]!r}.", f"It knows: {', '.join(sorted(known))}.")
    missing: dict[str, str] = {}
    base = _find_base(manifest, given.get(BASE), missing)
    rows = {data.name: _find_rows(data, project, given.get(ROWS + data.name), missing) for data in manifest.datasets}
    outside = _find_outside(manifest, given, missing)
    _look_at_suites(bundle, project, missing)
    name = project.slug if project else manifest.run.id
    return Plan(name, project is None, base, rows, outside, tuple(_differences(manifest)), missing)


def start(
    bundle: Bundle, plan: Plan, given: Mapping[str, Path] | None = None, name: str = ""
) -> tuple[Project, Run, Job]:
    """Make the project unless it is there (called `name`, or after the run), bring the data in and start the run.

    Raises BundleError while something is missing; nothing is made then.
    """
    if plan.missing:
        raise BundleError(f"The run cannot be reproduced yet: {'; '.join(plan.missing.values())}.", _how(plan))
    given = given or {}
    with tempfile.TemporaryDirectory(prefix="retune-bundle-") as folder:
        files = {data.name: _rows_file(bundle, data, plan, given, Path(folder)) for data in bundle.manifest.datasets}
        probes = {data.name: _probes(bundle, data, plan) for data in bundle.manifest.datasets}
        project = create_project(name or plan.project, plan.base) if plan.is_new else open_project(plan.project)
        try:
            for data in bundle.manifest.datasets:
                if file := files[data.name]:
                    _bring_in(project, data, file, probes[data.name], bundle.manifest.run.id)
            for suite_name, text in _suites(bundle).items():
                if suite_name not in library.own_names(project.folder):
                    suites.save_text(project, suite_name, text)
            run, job = _start_run(project, bundle, plan)
        except BaseException:
            if plan.is_new:
                delete_project(project.slug)
            raise
    return project, run, job


def _start_run(project: Project, bundle: Bundle, plan: Plan) -> tuple[Run, Job]:
    """The run, and beside its config what it is held against."""
    run, job = runs.start_run(
        project,
        _config_here(bundle, plan),
        allow_lint_errors=bool(bundle.manifest.run.started_despite),
        notes={"reproduces": {"run": bundle.manifest.run.id, "bundle": bundle.sha256}},
    )
    atomic_write_text(runs.run_folder(project, run.id) / EXPECTED_FILE, bundle.expected.to_json())
    return run, job


def expected_of(project: Project, run_id: str) -> Expected | None:
    """What a run is held against; None for one that reproduces nothing. Raises BundleError."""
    path = runs.run_folder(project, run_id) / EXPECTED_FILE
    return Expected.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _how(plan: Plan) -> str:
    return "Give " + ", ".join(f"--with {name}=PATH" for name in plan.missing) + "."


def _find_base(manifest: Manifest, given: Path | None, missing: dict[str, str]) -> str:
    """A base model with the very files, as a config names it: the one given, of the same name, or any here."""
    others = {}
    for name in _bases(manifest.base, given):
        with suppress(ModelError):
            others[name] = models.model_fingerprint(models.require(name))
            if others[name] == manifest.base_fingerprint:
                return name
    tried = str(given) if given else manifest.base
    other = f" (that of {tried!r} here is {others[tried][:12]})" if tried in others else ""
    wanted = f"{manifest.base!r} with fingerprint {manifest.base_fingerprint[:12]}"
    missing[BASE] = f"the base model {wanted} is not here{other}"
    return ""


def _bases(name: str, given: Path | None) -> Iterator[str]:
    if given:
        yield str(given.resolve())
        return
    if name == models.STARTER or models.HUB_ID.fullmatch(name.removeprefix(models.MODELSCOPE_PREFIX)):
        yield name
    yield from (model.name for model in models.list_models())
    for project in list_projects(archived=True):
        yield project.base
        with open_db(project.folder) as db:
            yield from {run.base for run in store_runs.listed(db)}


def _find_rows(data: Data, project: Project | None, given: Path | None, missing: dict[str, str]) -> str:
    if project and (there := _dataset(project, data.name)):
        if there == data.fingerprint:
            return HERE
        missing[ROWS + data.name] = (
            f"project {project.slug!r} has another dataset {data.name!r} (fingerprint {there[:12]}, not "
            f"{data.fingerprint[:12]}); choose another project"
        )
        return ""
    if data.file:
        return INSIDE
    if given:
        return str(given.resolve())
    for other in list_projects():
        if _dataset(other, data.name) == data.fingerprint:
            return other.slug
    missing[ROWS + data.name] = (
        f"the {data.num_rows} rows of {data.name!r} with fingerprint {data.fingerprint[:12]} are not in the bundle"
    )
    return ""


def _look_at_suites(bundle: Bundle, project: Project | None, missing: dict[str, str]) -> None:
    """Suites of the project that would be written over by the bundle's own."""
    for name, suite in _suites(bundle).items():
        if project and name in library.own_names(project.folder):
            there = library.load(project.folder, name)
            if there.hash != parse_suite(suite, name).hash:
                missing[f"suite.{name}"] = (
                    f"project {project.slug!r} has another suite {name!r}, with other questions; choose another project"
                )


def _suites(bundle: Bundle) -> dict[str, str]:
    """Texts of the suites in the bundle by name. Raises BundleError for one that is none."""
    found = {}
    for name in sorted(bundle.manifest.own_suites):
        if suite_file(name) in bundle.manifest.files:
            content = bundle.archive.read(suite_file(name), MOST_SUITE_BYTES)
            try:
                found[name] = content.decode("utf-8")
                parse_suite(found[name], name)
            except (UnicodeDecodeError, ConfigError) as error:
                raise BundleError(f"The suite {name!r} in the bundle cannot be used: {error}", DAMAGED) from error
    return found


def _dataset(project: Project, name: str) -> str:
    """The fingerprint of a project's dataset, "" when it has none of that name."""
    return next((each.fingerprint for each in datasets.listed(project) if each.name == name), "")


def _find_outside(manifest: Manifest, given: Mapping[str, Path], missing: dict[str, str]) -> dict[str, Path]:
    found = {}
    for each in manifest.outside:
        path = given.get(each.setting)
        if path and path.exists() and checkpoint_files.measure(path)["sha256"] == each.sha256:
            found[each.setting] = path.resolve()
        else:
            missing[each.setting] = f"{each.name!r} with sha256 {each.sha256[:12]}, which {each.setting} names"
    return found


def _differences(manifest: Manifest) -> Iterator[Difference]:
    """Of what is known before the start. What the run itself finds out is compared afterwards."""
    there, here = manifest.circumstances, machine.surroundings()
    yield from differences({name: there[name] for name in here if name in there}, here)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[Difference]:
    """Where two sets of circumstances part; what one of them does not know does not count."""
    for name in there:
        if name in here and there[name] != here[name]:
            yield Difference(name, there[name], here[name])


def _rows_file(bundle: Bundle, data: Data, plan: Plan, given: Mapping[str, Path], folder: Path) -> Path | None:
    """A file with the very rows; None when the project has them. Raises BundleError when they are others."""
    source = plan.rows[data.name]
    if source == HERE:
        return None
    if source == INSIDE:
        path = folder / f"{data.name}.jsonl"
        bundle.archive.unpack(data.file, path)
    elif ROWS + data.name in given:
        path = folder / f"{data.name}.jsonl"
        write_conversations(path, list(_conversations(Path(source), None)))
    else:
        other = open_project(source)
        path = other.path(datasets.get(other, data.name).path)
    found = fingerprint(_conversations(path))
    if found != data.fingerprint:
        raise BundleError(
            f"The rows of {data.name!r} are not those of the run: their fingerprint is {found[:12]}, that of the run's "
            f"{data.fingerprint[:12]}.",
            DAMAGED if data.file else "Give the file that the run's dataset was.",
        )
    return path


def _conversations(path: Path, format: str | None = "messages") -> Iterator[Conversation]:
    for _, row in convert_rows(scan(path), format):
        if isinstance(row, RowProblem):
            raise BundleError(f"{path.name}, {row}", DAMAGED)
        yield row


def _probes(bundle: Bundle, data: Data, plan: Plan) -> list[dict[str, Any]]:
    """The held-out questions: those in the bundle, or of the project that the rows are taken from."""
    if data.probes_file:
        lines = bundle.archive.read(data.probes_file, MOST_PROBES_BYTES).splitlines()
        return [_probe(line, data.probes_file) for line in lines if line.strip()]
    source = plan.rows[data.name]
    others = {project.slug for project in list_projects()}
    return datasets.load_probes(open_project(source), data.name) if source in others else []


def _probe(line: bytes, name: str) -> dict[str, Any]:
    """One held-out question, of the shape that scoring takes for granted. Raises BundleError."""
    try:
        probe = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BundleError(f"{name} in the bundle is not JSON: {str(error)[:120]}.", DAMAGED) from error
    if not _can_be_asked(probe):
        raise BundleError(f"{name} in the bundle holds {str(probe)[:80]!r}, which is no question.", DAMAGED)
    return probe


def _can_be_asked(probe: Any) -> bool:
    """Whether a suite can be made of it, as scoring does, and an identity question says which identity it expects."""
    if not isinstance(probe, dict) or probe.get("kind") not in KINDS_OF_PROBES:
        return False
    if not all(isinstance(probe.get(key, ""), str) for key in ("intent", "language", "expects")):
        return False
    try:
        if probe["kind"] == "identity" and not all(isinstance(probe["expected"][key], str) for key in IDENTITY):
            return False
        ProbeForm.model_validate(probe_form(probe, ()))
    except (LookupError, TypeError, ValueError):
        return False
    return True


def _bring_in(project: Project, data: Data, path: Path, probes: list[dict[str, Any]], run_id: str) -> None:
    made = datasets.save(
        project, data.name, _conversations(path), data.kind, data.origin, probes, f"from the bundle of {run_id}"
    )
    if made.fingerprint != data.fingerprint:
        raise DataError(f"The rows of {data.name!r} changed while they were brought in.", "Try again.")


def _config_here(bundle: Bundle, plan: Plan) -> RunConfig:
    """The bundle's config with this machine's places; where to get its data is left out, for the data is here."""
    values = bundle.config.model_dump(mode="json")
    values["model"]["base"], values["data"]["recipes"] = plan.base, {}
    values["model"]["continue_from"] = str(plan.outside.get("model.continue_from", ""))
    if "distributed.deepspeed" in plan.outside:
        values["distributed"]["deepspeed"] = str(plan.outside["distributed.deepspeed"])
    scored = {card.step for card in bundle.manifest.scorecards}
    if values["record"]["save_every_steps"] and scored - {bundle.manifest.run.step}:
        # On this machine the time would make other checkpoints than there, which take the place of those to be scored.
        values["record"]["save_every_minutes"] = 0.0
    return RunConfig.model_validate(values)
