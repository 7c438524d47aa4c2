"""Looks at a project's datasets: what the lint finds, what stands in the way of a run, the report, and safe fixes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from studio import datasets
from studio.config.schema import RunConfig
from studio.data.conversation import Conversation
from studio.data.identity import Identity
from studio.data.lint.check import lint
from studio.data.lint.findings import RULES, RULES_VERSION, Finding, LintResult
from studio.data.lint.fixes import FIX_WORDS, apply_fixes
from studio.data.lint.lengths import Encode
from studio.data.named import load_template
from studio.data.report import DatasetReport, Size, report_on
from studio.data.tokens import Example, TextTokenizer, encode_batch
from studio.errors import DataError
from studio.models import require, resolve
from studio.paths import sha256_of
from studio.projects import Project
from studio.store import lint_results, open_db
from studio.store.datasets import Dataset

MOST_STORED = 2_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokens:
    """How rows become tokens in a run: the base model, a template's name ("": the tokenizer's own), and the rest."""

    base: str
    max_length: int = 512
    template: str = ""
    loss_on: str = "assistant"

    def encoder(self) -> tuple[Encode, tuple[str, ...]]:
        """(the trainer's own function for some rows, control tokens). Raises ModelError, DataError."""
        folder = require(self.base)
        template, tokenizer = load_template(self.template, folder), TextTokenizer.load(folder)
        encode = partial(
            encode_batch, template=template, tokenizer=tokenizer, max_length=self.max_length, loss_on=self.loss_on
        )
        return encode, tokenizer.control_tokens

    def key(self) -> list[Any]:
        """Equal when the same rows give the same tokens."""
        folder = require(self.base)
        files = [sha256_of(folder / name) if (folder / name).is_file() else "" for name in TOKENIZER_FILES]
        return [*files, self.max_length, self.template, self.loss_on]


def tokens_of(config: RunConfig) -> Tokens:
    """As a run of this config makes them."""
    data = config.data
    return Tokens(config.model.base, data.max_length, data.template, data.loss_on)


def lint_dataset(
    project: Project,
    name: str,
    tokens: Tokens | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> LintResult:
    """What is wrong with a dataset, by row; with `tokens`, also as tokens. `quick` has all errors of the text alone.

    Held-out probes of all the project's datasets are looked for. A result is kept until rows, probes or rules
    change. `progress` gets rows done and rows in all. Raises DataError when the rows cannot be read.
    """
    dataset, probes = datasets.get(project, name), _all_probes(project)
    key = _key(dataset, probes, tokens, quick)
    with open_db(project.folder) as db:
        if known := lint_results.find(db, key):
            return known
    encode, control_tokens = tokens.encoder() if tokens else (None, ())
    result = lint(
        datasets.stream(project, name),
        identity=_identity(dataset),
        probes=probes,
        encode=encode,
        control_tokens=control_tokens,
        quick=quick,
        progress=(lambda done: progress(done, max(done, dataset.num_rows))) if progress else None,
        most=MOST_STORED,
    )
    with open_db(project.folder) as db:
        lint_results.put(db, key, name, result)
    return result


def require_rule(rule: str) -> None:
    """Raises DataError when the lint has no such rule."""
    if rule not in RULES:
        raise DataError(f"There is no rule {rule!r}.", f"Known: {', '.join(RULES)}.")


def errors_before_start(project: Project, config: RunConfig) -> list[str]:
    """Errors of the config's datasets, as `dataset, row 3: …`: those of a full check that was made, else a quick one.

    Datasets that are not there have none; `runs.problems_before_start` names them.
    """
    there = {dataset.name for dataset in datasets.listed(project)}
    errors = []
    for name in config.data.sources:
        if name in there:
            errors += _told(name, lint_before_start(project, name, config))
    return errors


def lint_before_start(project: Project, name: str, config: RunConfig) -> LintResult:
    """The full check of the rows as they are now when one was made, else a quick one."""
    dataset, probes = datasets.get(project, name), _all_probes(project)
    wanted = [tokens_of(config), None] if resolve(config.model.base).present else [None]
    with open_db(project.folder) as db:
        for tokens in wanted:
            if known := lint_results.find(db, _key(dataset, probes, tokens, quick=False)):
                return known
    return lint_dataset(project, name, quick=True)


def _told(name: str, result: LintResult, most: int = 20) -> list[str]:
    errors = [finding for finding in result.findings if finding.severity == "error"]
    told = [f"{name}, row {finding.row}: {finding.message}" for finding in errors[:most]]
    more = result.num_errors - len(told)
    return told + ([f"{name}: {more} more errors"] if more > 0 else [])


def fix(
    project: Project, name: str, findings: Finding | Sequence[Finding], expected_version: int | None = None
) -> Dataset:
    """Make the safe fix of one finding or of several, as one new version. Raises DataError.

    `expected_version` is the version that was checked: it is refused when the dataset is at another one by now.
    """
    wanted = [findings] if isinstance(findings, Finding) else list(findings)
    if not wanted:
        raise DataError(f"Nothing to fix in {name!r}.", "`retune data lint` lists what can be fixed.")
    version = datasets.get(project, name).version if expected_version is None else expected_version
    fixed = apply_fixes(datasets.stream(project, name, version), wanted)
    return datasets.save(project, name, fixed, made_by=_fix_words(wanted), expected_version=version)


def _fix_words(findings: Sequence[Finding]) -> str:
    rules = ", ".join(sorted({finding.rule for finding in findings}))
    done = ", ".join(sorted({FIX_WORDS[finding.fix] for finding in findings if finding.fix in FIX_WORDS}))
    where = f"row {findings[0].row}" if len(findings) == 1 else f"{len(findings)} findings"
    return f"fix of {where} ({rules}): {done}"


def report(
    project: Project, name: str, tokens: Tokens | None = None, progress: Progress | None = None
) -> DatasetReport:
    """What is in a dataset; with `tokens`, also how long its rows are and how much of them is trained."""
    dataset = datasets.get(project, name)
    encode = tokens.encoder()[0] if tokens else None
    seen = (lambda done: progress(done, max(done, dataset.num_rows))) if progress else None
    return report_on(datasets.stream(project, name), _measure(encode) if encode else None, seen)


def _measure(encode: Encode) -> Callable[[Sequence[Conversation]], list[Size | None]]:
    def measure(conversations: Sequence[Conversation]) -> list[Size | None]:
        return [_size(example) for example in encode(conversations)]

    return measure


def _size(example: Example | DataError) -> Size | None:
    if isinstance(example, DataError):
        return None
    return Size(len(example.input_ids), example.num_trained_tokens, example.truncated)


def _all_probes(project: Project) -> list[dict[str, Any]]:
    probes: list[dict[str, Any]] = []
    for dataset in datasets.listed(project):
        probes += datasets.load_probes(project, dataset.name)
    return probes


def _identity(dataset: Dataset) -> Identity | None:
    values = dataset.origin.get("identity")
    if not values:
        return None
    return Identity(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _key(dataset: Dataset, probes: Iterable[dict[str, Any]], tokens: Tokens | None, quick: bool) -> str:
    """Equal when the same check of the same rows is asked for."""
    asked = [probe.get("messages") for probe in probes]
    parts = [RULES_VERSION, dataset.fingerprint, dataset.origin.get("identity"), asked, quick]
    text = json.dumps([*parts, tokens.key() if tokens else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
