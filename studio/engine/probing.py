"""A short examination while a run goes on: a few held-out questions, asked to the model as it is now."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from studio import scores
from studio.config.schema import RunConfig
from studio.engine.answers import ask
from studio.engine.likelihood import ROWS_PER_FORWARD, example_of, fits
from studio.engine.models.load import LoadedModel
from studio.errors import ConfigError, DataError, Problem
from studio.probes import built_in, library
from studio.probes.assertions import Said
from studio.probes.suite import Probe
from studio.store import datasets, open_db

MAX_NEW_TOKENS = 48


class Prober:
    """Asks the same held-out questions again and again: those of the run's datasets, and general ones.

    Make it before a weight has changed: what the base model expects is measured then, for `probe/retention`.
    """

    def __init__(self, folder: Path, config: RunConfig, loaded: LoadedModel) -> None:
        """Raises ConfigError when the config wants probes and no dataset has any."""
        self._loaded = loaded
        self._probes = _probes_of(folder, config) if config.record.probe_every_steps else []
        self._examples = [
            example_of(loaded, each.messages, each.reference, each.reference_finished)
            for each in self._probes
            if each.reference
        ]
        if config.train.stop_at_forgetting and not self._examples:
            told = "no dataset has general questions that the base answered; make one on the Data page"
            raise ConfigError([Problem("train.stop_at_forgetting", told, "0")], config.name)
        self._base_loss = self._loss(loaded.model)

    def measure(self, model: nn.Module, check_stop: Callable[[], None] = lambda: None) -> dict[str, float]:
        """{"probe/identity", "probe/leakage"} as shares, and "probe/retention", how much the perplexity on the base's
        own answers to general questions has grown (0.1: by 10 %); only those that there are questions for.

        `check_stop` is called before every token, and may raise.
        """
        answers = [Said("")] * len(self._probes)
        questions = [each.messages for each in self._probes]
        for index, answer in ask(self._loaded, model, questions, MAX_NEW_TOKENS, check_stop):
            answers[index] = Said(answer.text, answer.finished)
        marked = [scores.mark(each, Said(""), said) for each, said in zip(self._probes, answers, strict=True)]
        card = scores.scorecard(marked)
        shares = {f"probe/{name}": card[name]["tuned"]["rate"] for name in ("identity", "leakage")}
        if self._examples:
            shares["probe/retention"] = scores.growth(self._loss(model) - self._base_loss)
        return {name: share for name, share in shares.items() if share is not None}

    def _loss(self, model: nn.Module) -> float:
        """Mean cross-entropy on the base's answers; 0 without any."""
        found = []
        for start in range(0, len(self._examples), ROWS_PER_FORWARD):
            found += fits(self._loaded, model, self._examples[start : start + ROWS_PER_FORWARD])
        return sum(each.loss for each in found) / max(1, sum(each.num_tokens for each in found))


def _probes_of(folder: Path, config: RunConfig) -> Sequence[Probe]:
    """`num_probes` of each kind, taken evenly."""
    with open_db(folder) as db:
        there = [each for each in datasets.listed(db) if each.num_probes]
    chosen = [each.name for each in there if each.name in config.data.sources or each.kind == "general"]
    try:
        return library.load(folder, built_in.STANDARD, chosen).limited(config.record.num_probes).probes()
    except DataError as error:
        problem = Problem("record.probe_every_steps", f"no dataset has held-out questions: {error.message}", "0")
        raise ConfigError([problem], config.name) from error
