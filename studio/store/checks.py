"""Goes through all rows of a stored dataset: the lint with its kept result, and the report; here and in jobs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from studio.data.conversation import Conversation
from studio.data.identity import Identity
from studio.data.lint.check import lint
from studio.data.lint.findings import RULES_VERSION, LintResult
from studio.data.lint.lengths import Encode
from studio.data.named import load_template
from studio.data.report import DatasetReport, Size, report_on
from studio.data.tokens import Example, Habits, TextTokenizer, encode_batch, habits_of
from studio.errors import DataError
from studio.models import require
from studio.paths import sha256_of
from studio.store import dataset_versions, datasets, lint_results, open_db
from studio.store.datasets import Dataset

MOST_STORED = 2_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

TEACHES = "teaches"  # in the origin of a dataset: whom a person said that its rows teach

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokens:
    """How rows become tokens in a run: the base model, a template's name ("": the tokenizer's own), and the rest."""

    base: str
    max_length: int = 512
    template: str = ""
    loss_on: str = "assistant"

    def encoder(self) -> "Encoder":
        """The trainer's own function for some rows, and what goes with it. Raises ModelError, DataError."""
        folder = require(self.base)
        template, tokenizer = load_template(self.template, folder), TextTokenizer.load(folder)
        encode = partial(
            encode_batch, template=template, tokenizer=tokenizer, max_length=self.max_length, loss_on=self.loss_on
        )
        return Encoder(encode, tokenizer.control_tokens, habits_of(template, self.loss_on))

    def key(self) -> list[Any]:
        """Equal when the same rows give the same tokens."""
        folder = require(self.base)
        files = [sha256_of(folder / name) if (folder / name).is_file() else "" for name in TOKENIZER_FILES]
        return [*files, self.max_length, self.template, self.loss_on]


@dataclass(frozen=True)
class Encoder:
    """`encode` gives the examples of some rows; `habits` are the template's."""

    encode: Encode
    control_tokens: tuple[str, ...] = ()
    habits: Habits = Habits()


def lint_rows(
    folder: Path, name: str, tokens: Tokens | None = None, quick: bool = False, progress: Progress | None = None
) -> LintResult:
    """As `dataset_checks.lint_dataset`, for the project in `folder`."""
    dataset, probes = _there(folder, name), all_probes(folder)
    key = _key(dataset, probes, tokens, quick)
    with open_db(folder) as db:
        if known := lint_results.find(db, key):
            return known
    encoder = tokens.encoder() if tokens else None
    result = lint(
        dataset_versions.stream(folder, name),
        identity=identity_of(dataset),
        probes=probes,
        encode=encoder.encode if encoder else None,
        control_tokens=encoder.control_tokens if encoder else (),
        quick=quick,
        progress=(lambda done: progress(done, max(done, dataset.num_rows))) if progress else None,
        most=MOST_STORED,
        habits=encoder.habits if encoder else Habits(),
        told_identity=TEACHES in dataset.origin,
    )
    with open_db(folder) as db:
        lint_results.put(db, key, name, result)
    return result


def known_lint(folder: Path, name: str, tokens: Tokens | None = None, quick: bool = False) -> LintResult | None:
    """The result of such a check of the rows as they are now; None when it was not made."""
    key = _key(_there(folder, name), all_probes(folder), tokens, quick)
    with open_db(folder) as db:
        return lint_results.find(db, key)


def report_rows(
    folder: Path, name: str, tokens: Tokens | None = None, progress: Progress | None = None
) -> DatasetReport:
    """As `dataset_checks.report`, for the project in `folder`."""
    dataset = _there(folder, name)
    encode = tokens.encoder().encode if tokens else None
    seen = (lambda done: progress(done, max(done, dataset.num_rows))) if progress else None
    return report_on(dataset_versions.stream(folder, name), _measure(encode) if encode else None, seen)


def all_probes(folder: Path) -> list[dict[str, Any]]:
    """The held-out probes of all datasets of a project."""
    with open_db(folder) as db:
        names = [dataset.name for dataset in datasets.listed(db)]
    return [probe for name in names for probe in dataset_versions.load_probes(folder, name)]


def identity_of(dataset: Dataset) -> Identity | None:
    """Whom the rows teach: the identity that they were built for, or that a person named for them."""
    if values := dataset.origin.get("identity"):
        return Identity(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    if told := dataset.origin.get(TEACHES):
        return Identity(told["name"], told.get("maker") or told["name"])
    return None


def report_key(dataset: Dataset, tokens: Tokens | None) -> str:
    """Equal when a report of the same rows with the same tokens is asked for."""
    text = json.dumps([dataset.fingerprint, asdict(tokens) if tokens else None, tokens.key() if tokens else None])
    return hashlib.sha256(text.encode()).hexdigest()


def _there(folder: Path, name: str) -> Dataset:
    with open_db(folder) as db:
        dataset = datasets.get(db, name)
    return dataset_versions.settle(folder, dataset)


def _measure(encode: Encode) -> Callable[[Sequence[Conversation]], list[Size | None]]:
    def measure(conversations: Sequence[Conversation]) -> list[Size | None]:
        return [_size(example) for example in encode(conversations)]

    return measure


def _size(example: Example | DataError) -> Size | None:
    if isinstance(example, DataError):
        return None
    return Size(len(example.input_ids), example.num_trained_tokens, example.truncated)


def _key(dataset: Dataset, probes: Iterable[dict[str, Any]], tokens: Tokens | None, quick: bool) -> str:
    """Equal when the same check of the same rows is asked for."""
    asked = [probe.get("messages") for probe in probes]
    parts = [
        RULES_VERSION,
        dataset.fingerprint,
        dataset.origin.get("identity"),
        dataset.origin.get(TEACHES),
        asked,
        quick,
    ]
    text = json.dumps([*parts, tokens.key() if tokens else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
