"""The `evaluate` verb: base and tuned weights answer held-out probes; marks and scores go to the database."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studio import scores
from studio.data.files import read_rows
from studio.data.formats import Conversation, Message
from studio.data.tokens import IGNORE_INDEX, encode_conversation
from studio.engine.adapters import core_of, load_adapter
from studio.engine.answers import ask, ask_base
from studio.engine.cache import growing_cache
from studio.engine.convert import folder_of_run
from studio.engine.devices import pick_device, pick_dtype, set_threads
from studio.engine.distill import MAX_NEW_TOKENS
from studio.engine.generate import quiet, wearing
from studio.engine.job import JobContext
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.virtual import has_virtual_tokens, read_virtual_tokens
from studio.engine.weights import ADAPTER_CONFIG, read_seal, weights_hash
from studio.errors import DataError, ModelError
from studio.machine import versions
from studio.models import require
from studio.paths import inside, sha256_of
from studio.scores import MarkedAnswer
from studio.store import evaluations, open_db
from studio.store.evaluations import Answer, Evaluation

ROWS_PER_FORWARD = 8  # logits of a row take (tokens x vocabulary) numbers
Probe = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """Weights to be scored: an adapter's folder or a full model's."""

    label: str
    folder: Path
    run_id: str = ""
    step: int = 0

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class Measured:
    """Answers to all probes, and for those with a reference the loss on it: (sum over tokens, tokens)."""

    answers: list[str]
    losses: list[tuple[float, int]]


def run(job: JobContext) -> dict[str, Any]:
    """Score each subject beside the base. Args: base, subjects, probes, limit.

    A subject has a label, run_id and step; a checkpoint that was not converted is converted first. A `path` says where
    its weights lie instead.
    """
    subjects = [_subject(job, values) for values in job.args["subjects"]]
    hashes = [_verified_hash(subject) for subject in subjects]
    probes = read_probes(job.folder, job.args["probes"], int(job.args.get("limit") or 0))
    job.phase("loading the base model")
    set_threads()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    examiner = Examiner(job, load_base(require(job.args["base"]), dtype=dtype, device=device), probes)
    base = examiner.base()
    scored = [
        (number, examiner.adapter(number, subject)) for number, subject in enumerate(subjects) if subject.is_adapter
    ]
    examiner.release()
    scored += [
        (number, examiner.full_model(number, subject))
        for number, subject in enumerate(subjects)
        if not subject.is_adapter
    ]
    setting = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "sampling": "greedy",
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "probes": list(job.args["probes"]),
        "num_probes": len(probes),
        "identity": scores.identity_words(probes),
        "versions": versions(),
    }
    job.phase("storing scores")
    results = [
        _store(job, subjects[number], hashes[number], probes, base, tuned, setting)
        for number, tuned in sorted(scored, key=lambda pair: pair[0])
    ]
    return {"evaluations": [one.id for one in results], "scores": [one.scores for one in results]}


class Examiner:
    """Asks the probes of one set of weights after the other; the base is in memory once for all its adapters."""

    def __init__(self, job: JobContext, loaded: LoadedModel, probes: Sequence[Probe]) -> None:
        self._job = job
        self._loaded: LoadedModel | None = loaded
        self._model: nn.Module = loaded.model
        self._device, self._dtype = loaded.device, loaded.dtype
        self._probes = probes
        self._questions = [probe["messages"] for probe in probes]
        self._references: list[str] = []
        self._cut_references: list[bool] = []

    def base(self) -> Measured:
        """The base's answers; each is the reference where a probe brings none. Nothing is measured on an empty one."""
        loaded = self._require_loaded()
        self._job.phase("asking the base model", len(self._questions), "prompts")
        found = ask_base(loaded, self._model, self._questions, MAX_NEW_TOKENS, self._job.progress, self._job.check_stop)
        for probe, answer in zip(self._probes, found, strict=True):
            general = probe["kind"] == "general"
            own = probe.get("reference") is None
            self._references.append((answer.text if own else str(probe["reference"])) if general else "")
            self._cut_references.append(not (answer.finished if own else probe.get("reference_finished", True)))
        return Measured([answer.text for answer in found], self._losses(loaded, self._model))

    def adapter(self, number: int, subject: Subject) -> Measured:
        """One adapter on the base that is in memory."""
        loaded = self._require_loaded()
        name = f"subject_{number}"
        self._model = load_adapter(self._model, subject.folder, name)
        return self._measure(loaded.with_template_of(subject.folder), self._model, name)

    def full_model(self, number: int, subject: Subject) -> Measured:
        """A full model of its own, loaded for itself alone."""
        self._job.phase("loading the tuned model")
        loaded = load_base(subject.folder, dtype=self._dtype, device=self._device)
        try:
            return self._measure(loaded, loaded.model, None)
        finally:
            del loaded
            _free_memory()

    def release(self) -> None:
        """Give the base's memory back."""
        self._loaded, self._model = None, nn.Identity()
        _free_memory()

    def _measure(self, loaded: LoadedModel, model: nn.Module, adapter: str | None) -> Measured:
        self._job.phase("asking the tuned model", len(self._questions), "prompts")
        texts = [""] * len(self._questions)
        with wearing(model, adapter):
            found = ask(loaded, model, self._questions, MAX_NEW_TOKENS, self._job.check_stop)
            for count, (index, answer) in enumerate(found, start=1):
                texts[index] = answer.text
                self._job.progress(count)
            return Measured(texts, self._losses(loaded, model))

    def _losses(self, loaded: LoadedModel, model: nn.Module) -> list[tuple[float, int]]:
        with_reference = [index for index, reference in enumerate(self._references) if reference]
        self._job.phase("measuring what is remembered", len(with_reference), "prompts")
        losses = [(0.0, 0)] * len(self._probes)
        examples = {index: self._example(loaded, index) for index in with_reference}
        order = sorted(with_reference, key=lambda index: len(examples[index][0]))
        for start in range(0, len(order), ROWS_PER_FORWARD):
            self._job.check_stop()
            batch = order[start : start + ROWS_PER_FORWARD]
            found = answer_losses(loaded, model, [examples[index] for index in batch])
            for index, loss in zip(batch, found, strict=True):
                losses[index] = loss
            self._job.progress(start + len(batch))
        return losses

    def _example(self, loaded: LoadedModel, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a question with its reference; only the answer counts, a cut one without its end."""
        turns = [Message(turn["role"], turn["content"]) for turn in self._questions[index]]
        chat = Conversation((*turns, Message("assistant", self._references[index])))
        example = encode_conversation(chat, loaded.template, loaded.tokenizer, loss_on="last")
        labels = list(example.labels)
        if self._cut_references[index]:
            labels = [IGNORE_INDEX if label in loaded.eos_ids else label for label in labels]
        return list(example.input_ids), labels

    def _require_loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise ModelError("The base model was released already.", "Score adapters before full models.")
        return self._loaded


def answer_losses(
    loaded: LoadedModel, model: nn.Module, examples: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, int]]:
    """For each (ids, labels): cross-entropy summed over labelled tokens, and how many there are."""
    shared = 0 if has_virtual_tokens(model) else _common_beginning(examples)
    ids = _padded([ids[shared:] for ids, _ in examples], loaded.pad_id, loaded.device)
    labels = _padded([labels[shared:] for _, labels in examples], IGNORE_INDEX, loaded.device)
    mask = _padded([[1] * len(ids) for ids, _ in examples], 0, loaded.device)
    core, cache = core_of(model), growing_cache()
    with torch.no_grad(), quiet(model):
        mask = torch.cat([read_virtual_tokens(model, cache, [None] * len(examples)), mask], dim=1)
        if shared:  # a system message, mostly: read once for all rows
            beginning = torch.tensor([examples[0][0][:shared]], device=loaded.device)
            core(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_select_indices(torch.zeros(len(examples), dtype=torch.long, device=loaded.device))
        logits = core(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    losses = []
    for row_logits, row_labels in zip(logits[:, :-1], labels[:, 1:], strict=True):
        counted = row_labels != IGNORE_INDEX
        total = cross_entropy(row_logits[counted].float(), row_labels[counted], reduction="sum")
        losses.append((float(total), int(counted.sum())))
    return losses


def _common_beginning(examples: Sequence[tuple[list[int], list[int]]]) -> int:
    """Number of tokens that all rows begin with, ending before the token that foretells a row's first label."""
    counted = [next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in examples]
    columns = zip(*(ids[: min(counted) - 1] for ids, _ in examples), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """(rows, longest), filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)


def read_probes(folder: Path, names: Sequence[str], limit: int) -> list[Probe]:
    """Probes of the named datasets, `limit` of each taken evenly (0: all). Raises DataError when there are none."""
    probes: list[Probe] = []
    for name in names:
        path = inside(folder, f"data/{name}.probes.jsonl")
        if not path.is_file():
            raise DataError(
                f"The dataset {name!r} has no held-out probes.", "Build it on the Data page; imports have none."
            )
        rows = [row for _, row in read_rows(path)]
        probes += _evenly([row for row in rows if isinstance(row, dict) and row.get("messages")], limit)
    if not probes:
        raise DataError(f"There is no probe in {', '.join(names) or 'no dataset'}.", "Build an identity dataset first.")
    return probes


def _evenly(items: list[Probe], limit: int) -> list[Probe]:
    if limit <= 0 or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _subject(job: JobContext, values: dict[str, Any]) -> Subject:
    run_id, step = str(values.get("run_id") or ""), int(values.get("step") or 0)
    given = values.get("path") or folder_of_run(job, run_id, step)
    folder = given if Path(given).is_absolute() else inside(job.folder, given)
    if not Path(folder).is_dir():
        raise ModelError(f"There are no weights in {str(folder)!r}.", "Convert the checkpoint first.")
    return Subject(values["label"], Path(folder), run_id, step)


def _verified_hash(subject: Subject) -> str:
    return str(read_seal(subject.folder).get("sha256") or weights_hash(subject.folder))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _store(
    job: JobContext,
    subject: Subject,
    digest: str,
    probes: Sequence[Probe],
    base: Measured,
    tuned: Measured,
    setting: dict[str, Any],
) -> Evaluation:
    marked = mark_all(probes, base, tuned)
    evaluation = Evaluation(
        job_id=job.id,
        subject=subject.label,
        base=job.args["base"],
        weights_hash=digest,
        dataset=", ".join(job.args["probes"]),
        scores=scores.scorecard(marked) | {"setting": setting | {"changed_datasets": _changed(job, subject)}},
        run_id=subject.run_id,
        step=subject.step,
    )
    rows = [_row(evaluation.id, number, answer) for number, answer in enumerate(marked)]
    with open_db(job.folder) as db:
        return evaluations.add(db, evaluation, rows)


def _changed(job: JobContext, subject: Subject) -> list[str]:
    """The probes' datasets that are not what the weights were trained on; they may ask for another identity."""
    trained_on = read_seal(subject.folder).get("data_fingerprints") or {}
    files = {name: inside(job.folder, f"data/{name}.jsonl") for name in job.args["probes"] if name in trained_on}
    return [name for name, file in files.items() if not file.is_file() or sha256_of(file) != trained_on[name]]


def mark_all(probes: Sequence[Probe], base: Measured, tuned: Measured) -> list[MarkedAnswer]:
    """Both answers to every probe, judged."""
    words = scores.identity_words(probes)
    return [
        scores.mark(
            probe, base.answers[i], tuned.answers[i], words, base.losses[i][0], tuned.losses[i][0], tuned.losses[i][1]
        )
        for i, probe in enumerate(probes)
    ]


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
