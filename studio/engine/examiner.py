"""Asks the probes of one set of weights after the other; the base is in memory once for all its adapters."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from studio.engine.adapters import load_adapter
from studio.engine.answers import Answer, AnswerMemory, Messages, ask_remembered
from studio.engine.generate import wearing
from studio.engine.job import JobContext
from studio.engine.likelihood import ROWS_PER_FORWARD, Fit, Outlook, example_of, fits
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.virtual import has_virtual_tokens
from studio.errors import ModelError
from studio.probes.suite import Probe, Suite

AskAll = Callable[[Sequence[Messages]], list[Answer]]


@dataclass(frozen=True)
class Measured:
    """What was answered to each probe at last, and how well its reference is predicted (None where there is none).

    `num_remembered`: answers that were given before and not asked for again.
    """

    answers: list[Answer]
    fits: list[Fit | None]
    num_remembered: int = 0


class Examiner:
    """One suite, one base, any number of tuned weights. Ask the base first: its answers are the references."""

    def __init__(self, job: JobContext, loaded: LoadedModel, suite: Suite) -> None:
        self._job = job
        self._loaded: LoadedModel | None = loaded
        self._model: nn.Module = loaded.model
        self._device, self._dtype = loaded.device, loaded.dtype
        self._probes, self._max_new_tokens = suite.probes(), suite.max_new_tokens
        self._num_asked = sum(1 + len(probe.follow_ups) for probe in self._probes)
        self._references: list[Answer | None] = []
        self._base_fits: list[Fit | None] = []
        self._done = self._total = 0
        self._adapter, self._num_adapters = "", 0

    def expect(self, num_subjects: int) -> None:
        """How many tuned weights will be asked, for the progress of the whole job."""
        self._done, self._total = 0, num_subjects * self._num_asked

    def base(self) -> Measured:
        """The base's answers; each is the reference where a probe brings none. Nothing is measured on an empty one."""
        loaded = self._require_loaded()
        self._job.phase("asking the base model", self._num_asked, "prompts")
        with AnswerMemory.of(loaded, self._max_new_tokens) as memory:
            answers, remembered = self._ask(memory, loaded, self._model)
        self._references = [_reference(*pair) for pair in zip(self._probes, answers, strict=True)]
        self._base_fits = self._fits(loaded, self._model)
        return Measured(answers, self._base_fits, remembered)

    def adapter(self, folder: Path, weights: str) -> Measured:
        """One adapter, `weights` its hash, on the base that is in memory, in place of the one before."""
        loaded, before = self._require_loaded(), self._adapter
        self._num_adapters += 1
        self._adapter = f"weights_{self._num_adapters}"
        self._model = load_adapter(self._model, folder, self._adapter)
        if before and not has_virtual_tokens(self._model):
            self._model.set_adapter(self._adapter)
            self._model.delete_adapter(before)
        return self._measure(loaded.with_template_of(folder), self._model, self._adapter, weights)

    def full_model(self, folder: Path, weights: str) -> Measured:
        """A full model of its own, loaded for itself alone."""
        self._job.phase("loading the tuned model")
        loaded = load_base(folder, dtype=self._dtype, device=self._device)
        try:
            return self._measure(loaded, loaded.model, None, weights)
        finally:
            del loaded
            _free_memory()

    def release(self) -> None:
        """Give the base's memory back."""
        self._loaded, self._model = None, nn.Identity()
        _free_memory()

    def _measure(self, loaded: LoadedModel, model: nn.Module, adapter: str | None, weights: str) -> Measured:
        self._job.phase("asking the tuned model", self._total, "prompts", current=self._done)
        with wearing(model, adapter), AnswerMemory.of(loaded, self._max_new_tokens, weights) as memory:
            answers, remembered = self._ask(memory, loaded, model)
            self._done += self._num_asked
            return Measured(answers, self._fits(loaded, model), remembered)

    def _ask(self, memory: AnswerMemory, loaded: LoadedModel, model: nn.Module) -> tuple[list[Answer], int]:
        asked = 0

        def ask_all(chats: Sequence[Messages]) -> list[Answer]:
            nonlocal asked
            before = self._done + asked
            asked += len(chats)
            return ask_remembered(
                memory, loaded, model, chats, self._max_new_tokens,
                lambda number: self._job.progress(before + number), self._job.check_stop,
            )  # fmt: skip

        num_known = memory.num_known
        answers = hold(self._probes, ask_all)
        return answers, self._num_asked - (memory.num_known - num_known)

    def _fits(self, loaded: LoadedModel, model: nn.Module) -> list[Fit | None]:
        wanted = {index: reference for index, reference in enumerate(self._references) if reference}
        found: list[Fit | None] = [None] * len(self._probes)
        if wanted:
            self._job.phase("measuring what is remembered", len(wanted), "prompts")
        examples = {
            index: example_of(loaded, self._probes[index].messages, reference.text, reference.finished)
            for index, reference in wanted.items()
        }
        order = sorted(wanted, key=lambda index: len(examples[index][0]))
        for start in range(0, len(order), ROWS_PER_FORWARD):
            self._job.check_stop()
            batch = order[start : start + ROWS_PER_FORWARD]
            made = fits(loaded, model, [examples[index] for index in batch], self._outlooks(batch))
            for index, fit in zip(batch, made, strict=True):
                found[index] = fit
            self._job.progress(start + len(batch))
        return found

    def _outlooks(self, batch: Sequence[int]) -> list[Outlook | None]:
        fits_there = [self._base_fits[index] for index in batch] if self._base_fits else []
        return [fit.outlook if fit else None for fit in fits_there]

    def _require_loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise ModelError("The base model was released already.", "Score adapters before full models.")
        return self._loaded


def hold(probes: Sequence[Probe], ask_all: AskAll) -> list[Answer]:
    """The last answer to each probe. One with follow-ups is a chat of several rounds: the model answers each turn, and
    its own words stand before the next."""
    chats = [list(probe.messages) for probe in probes]
    answers = ask_all(chats)
    for turn in range(max((len(probe.follow_ups) for probe in probes), default=0)):
        going_on = [index for index, probe in enumerate(probes) if len(probe.follow_ups) > turn]
        for index in going_on:
            chats[index].append({"role": "assistant", "content": answers[index].text})
            chats[index].append({"role": "user", "content": probes[index].follow_ups[turn]})
        for index, answer in zip(going_on, ask_all([chats[index] for index in going_on]), strict=True):
            answers[index] = answer
    return answers


def _reference(probe: Probe, base: Answer) -> Answer | None:
    """What is measured on, None for nothing: the probe's own text, else the base's answer to a single question."""
    if not probe.measured or (probe.reference is None and probe.follow_ups):
        return None
    found = base if probe.reference is None else Answer(probe.reference, probe.reference_finished)
    return found if found.text else None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
