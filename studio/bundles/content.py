"""What is in a bundle: a run as its project remembers it, and, unless left out, the rows it learned from.

- bundle.json: typed as `Manifest`, with size and sha256 of every other file
- config.yaml: the frozen config, without places on the machine it came from
- metrics.json: every number of every step, as {name: [[step, value], ...]}
- data/NAME.jsonl, data/NAME.probes.jsonl, answers.jsonl, samples.jsonl: the rows, and what was said about them
- suites/NAME.yaml: the project's own suites that scored the run, as they were asked
- README.md: what this is and how to run it again, for people
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio import scores
from studio.bundles.archive import DAMAGED, HOSTILE, SafeZip
from studio.config.schema import ZERO_PRESETS, RunConfig, Slug
from studio.config.yaml import load_text
from studio.errors import BundleError, ConfigError
from studio.paths import sha256_of
from studio.probes import built_in
from studio.store.evaluations import STANDARD, Evaluation

FORMAT = "retune-bundle/1"
MANIFEST, CONFIG, METRICS, README = "bundle.json", "config.yaml", "metrics.json", "README.md"
SAMPLES, ANSWERS = "samples.jsonl", "answers.jsonl"
MOST_MANIFEST_BYTES = 8 * 2**20
MOST_METRICS_BYTES = 256 * 2**20
MOST_CONFIG_BYTES = 2**20
Sha256 = Field(pattern=r"[0-9a-f]{64}")
Setting = Literal["model.continue_from", "distributed.deepspeed"]
Interval = tuple[float, float, float]  # value, low, high


class Part(BaseModel):
    """Frozen, and nothing that is not named; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=100_000)


class File(Part):
    size_bytes: int = Field(ge=0)
    sha256: str = Sha256


class RunFacts(Part):
    """`learned_sha256`: of the weights after the last step, "" where none was taken."""

    id: str = Field(pattern=r"[a-z0-9][a-z0-9_-]{0,100}-\d{1,9}")
    method: str
    created_at: str
    state: str
    step: int = Field(ge=0)
    num_steps: int = Field(ge=0)
    learned_sha256: str = Field("", pattern=r"([0-9a-f]{64})?")
    started_despite: tuple[str, ...] = ()


class Data(Part):
    """One dataset. `learned`: the run trained on it; else it was only asked about. `file` is empty when left out."""

    name: Slug
    kind: Slug
    version: int = Field(ge=1)
    fingerprint: str = Sha256
    num_rows: int = Field(ge=0)
    num_probes: int = Field(ge=0)
    origin: dict[str, Any] = {}
    learned: bool
    file: str = ""
    probes_file: str = ""


class Outside(Part):
    """A file or folder that a config names and that is not in the bundle; `setting` is its place in the config."""

    setting: Setting
    name: str
    sha256: str = Sha256


class Began(Part):
    """Under what circumstances the steps after `step` were computed."""

    step: int = Field(ge=0)
    circumstances: dict[str, str]


class Score(Part):
    """One line of a scorecard, base and tuned with their 95 % intervals."""

    name: str
    base: Interval | None
    tuned: Interval | None
    num_probes: int = Field(ge=0)


class Scorecard(Part):
    """By one suite. `limit`: probes asked of each group at most, 0 for all."""

    suite: Slug = STANDARD
    step: int = Field(ge=0)
    datasets: tuple[str, ...]
    limit: int = Field(ge=0)
    scores: tuple[Score, ...]
    weights_sha256: str
    setting: dict[str, Any] = {}


class Manifest(Part):
    """The content of bundle.json."""

    format: Literal["retune-bundle/1"]
    run: RunFacts
    base: str
    base_fingerprint: str = Sha256
    seed: int
    began: tuple[Began, ...]
    datasets: tuple[Data, ...]
    outside: tuple[Outside, ...] = ()
    scorecards: tuple[Scorecard, ...] = ()
    commands: tuple[str, ...]
    files: dict[str, File]

    @property
    def own_suites(self) -> set[str]:
        """Names of the suites that are not built in."""
        return {card.suite for card in self.scorecards} - set(built_in.NAMES)

    @property
    def has_rows(self) -> bool:
        return any(data.file for data in self.datasets)

    @property
    def circumstances(self) -> dict[str, str]:
        """Those of the last start; equal for all starts unless `is_uniform` is False."""
        return self.began[-1].circumstances if self.began else {}

    @property
    def is_uniform(self) -> bool:
        return all(each.circumstances == self.circumstances for each in self.began)


def suite_file(name: str) -> str:
    """Where a bundle has a suite of the project's own."""
    return f"suites/{name}.yaml"


def scores_of(card: Evaluation) -> tuple[Score, ...]:
    """What a scorecard says, line by line; of other suites than the standard one the share passed of each group too."""
    lines = [line for line in scores.lines(card.scores) if card.is_standard or line.num_probes]
    found = [Score(name=each.name, base=each.base, tuned=each.tuned, num_probes=each.num_probes) for each in lines]
    if not card.is_standard:
        found += [_group_score(name, sides) for name, sides in card.scores.get("groups", {}).items()]
    return tuple(found)


def _group_score(name: str, sides: Mapping[str, Any]) -> Score:
    base, tuned = (scores.triple(sides[side]) for side in ("base", "tuned"))
    return Score(name=f"passed of {name}", base=base, tuned=tuned, num_probes=sides["tuned"]["total"])


Numbers = Mapping[str, list[tuple[int, float | None]]]


@dataclass(frozen=True)
class Expected:
    """What a second run is held against: everything but the rows."""

    manifest: Manifest
    metrics: Numbers

    def to_json(self) -> str:
        return json.dumps({"manifest": self.manifest.model_dump(mode="json"), "metrics": self.metrics})

    @classmethod
    def from_json(cls, text: str) -> "Expected":
        """Raises BundleError."""
        values = _json(text.encode(), "what the run reproduces")
        if not isinstance(values, dict):
            raise BundleError("What the run reproduces cannot be read.", DAMAGED)
        return cls(_manifest(values.get("manifest")), _numbers(values.get("metrics")))


@dataclass(frozen=True)
class Bundle:
    """An open bundle, all of whose files have the hashes that its manifest lists."""

    archive: SafeZip
    expected: Expected
    config: RunConfig
    sha256: str

    @property
    def manifest(self) -> Manifest:
        return self.expected.manifest


@contextmanager
def open_bundle(source: Path | BinaryIO) -> Iterator[Bundle]:
    """A bundle from anywhere; every byte of it is read once. Raises BundleError for one that is damaged or hostile."""
    with SafeZip(source) as archive:
        manifest = _manifest(_json(archive.read(MANIFEST, MOST_MANIFEST_BYTES), MANIFEST))
        _require_files(archive, manifest)
        try:
            config = load_text(archive.read(CONFIG, MOST_CONFIG_BYTES).decode("utf-8"), CONFIG)
        except (UnicodeDecodeError, ConfigError) as error:
            raise BundleError(f"The config in the bundle cannot be used: {error}", DAMAGED) from error
        _require_listed(config, manifest)
        metrics = _numbers(_json(archive.read(METRICS, MOST_METRICS_BYTES), METRICS))
        yield Bundle(archive, Expected(manifest, metrics), config, _sha256(source))


def _sha256(source: Path | BinaryIO) -> str:
    if isinstance(source, Path):
        return sha256_of(source)
    source.seek(0)
    return hashlib.file_digest(source, "sha256").hexdigest()


def _require_files(archive: SafeZip, manifest: Manifest) -> None:
    """The zip holds what the manifest lists, no more, no less, byte for byte. Raises BundleError."""
    allowed = {CONFIG, METRICS, README, SAMPLES, ANSWERS, *map(suite_file, manifest.own_suites)}
    for data in manifest.datasets:
        if {data.file, data.probes_file} - {"", f"data/{data.name}.jsonl", f"data/{data.name}.probes.jsonl"}:
            raise BundleError(f"The rows of {data.name!r} are said to lie in {data.file!r}.", HOSTILE)
        allowed |= {data.file, data.probes_file} - {""}
    if strange := sorted(set(manifest.files) - allowed):
        raise BundleError(f"The bundle lists {strange[0]!r}, which no bundle holds.", HOSTILE)
    if strange := sorted(archive.names ^ (set(manifest.files) | {MANIFEST})):
        there = strange[0] in archive.names
        raise BundleError(f"{strange[0]!r} is {'not listed in' if there else 'missing from'} the bundle.", DAMAGED)
    for name, file in manifest.files.items():
        if archive.size(name) != file.size_bytes or archive.sha256(name) != file.sha256:
            raise BundleError(f"{name} in the bundle is not what was put in: its sha256 differs.", DAMAGED)


def _require_listed(config: RunConfig, manifest: Manifest) -> None:
    """No file of this machine is read because a stranger's config names it. Raises BundleError."""
    own_settings = config.distributed.deepspeed not in ZERO_PRESETS
    named = {"model.continue_from": bool(config.model.continue_from), "distributed.deepspeed": own_settings}
    if missing := {setting for setting, is_named in named.items() if is_named} - {o.setting for o in manifest.outside}:
        raise BundleError(f"The config in the bundle names a file by {missing.pop()}, and not which one.", HOSTILE)


def _manifest(values: Any) -> Manifest:
    written = values.get("format") if isinstance(values, dict) else None
    if written != FORMAT:
        raise BundleError(f"It has the format {str(written)[:60]!r}, not {FORMAT!r}.", "Update this installation.")
    try:
        return Manifest.model_validate(values)
    except (ValidationError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not one of ours: {_first(error)}.", HOSTILE) from error


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deeply"
    problem = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))[:120]}: {problem['msg'][:120]}"


def _numbers(values: Any) -> Numbers:
    """{name: [(step, value or None)]}. Raises BundleError."""
    if not isinstance(values, dict) or not all(isinstance(points, list) for points in values.values()):
        raise BundleError(f"{METRICS} is not one of ours.", HOSTILE)
    return {name: [_point(point) for point in points] for name, points in values.items()}


def _point(point: Any) -> tuple[int, float | None]:
    match point:
        case [int(step), None | int() | float() as value]:
            return step, None if value is None else float(value)
    raise BundleError(f"{METRICS} holds {str(point)[:60]!r} where a step and a number belong.", HOSTILE)


def _json(content: bytes, name: str) -> Any:
    """Raises BundleError for what is no JSON, and for NaN and Infinity, which JSON does not have."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} in the bundle is not JSON: {str(error)[:120]}.", DAMAGED) from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
