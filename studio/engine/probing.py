"""A short examination while a run goes on: a few held-out questions, asked to the model as it is now."""

from pathlib import Path
from typing import Any

from torch import nn

from studio import scores
from studio.config.schema import RunConfig
from studio.engine.answers import ask
from studio.engine.evaluate import read_probes
from studio.engine.models.load import LoadedModel
from studio.errors import ConfigError, DataError, Problem
from studio.store import datasets, open_db

MAX_NEW_TOKENS = 48


class Prober:
    """Asks the same held-out questions again and again: those of the run's datasets, and general ones."""

    def __init__(self, folder: Path, config: RunConfig, loaded: LoadedModel) -> None:
        """Raises ConfigError when the config wants probes and no dataset has any."""
        self._loaded = loaded
        self._probes = _probes_of(folder, config) if config.record.probe_every_steps else []
        self._words = scores.identity_words(self._probes)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """{"probe/identity", "probe/leakage"}, as shares; only those that there are questions for."""
        answers = [""] * len(self._probes)
        for index, answer in ask(self._loaded, model, [each["messages"] for each in self._probes], MAX_NEW_TOKENS):
            answers[index] = answer.text
        marked = [scores.mark(each, "", text, self._words) for each, text in zip(self._probes, answers, strict=True)]
        identity = [each.passed for each in marked if each.kind == "identity"]
        general = [not each.passed for each in marked if each.kind == "general"]
        shares = {"probe/identity": scores.rate(identity)["rate"], "probe/leakage": scores.rate(general)["rate"]}
        return {name: share for name, share in shares.items() if share is not None}


def score_of(measured: dict[str, float]) -> float:
    """Identity minus leakage: 1 is a model that says who it is when asked, and only then."""
    return measured.get("probe/identity", 0.0) - measured.get("probe/leakage", 0.0)


def _probes_of(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """`num_probes` of each kind, taken evenly."""
    with open_db(folder) as db:
        there = [each for each in datasets.listed(db) if each.num_probes]
    chosen = [each.name for each in there if each.name in config.data.sources or each.kind == "general"]
    try:
        found = read_probes(folder, chosen, 0)
    except DataError as error:
        problem = Problem("record.probe_every_steps", f"no dataset has held-out questions: {error.message}", "0")
        raise ConfigError([problem], config.name) from error
    by_kind = {kind: [each for each in found if each["kind"] == kind] for kind in ("identity", "general")}
    return [each for probes in by_kind.values() for each in _evenly(probes, config.record.num_probes)]


def _evenly(items: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return items if number >= len(items) else [items[index * len(items) // number] for index in range(number)]
