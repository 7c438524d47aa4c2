"""The `distill` verb: the base model answers general questions itself, so that training can keep what it knows.

Half of the questions become rows to train on, the other half probes with the base's answer as reference.
"""

import re
from collections.abc import Sequence
from typing import Any

from studio.data.formats import Conversation, Message
from studio.data.general import Prompt, general_prompts
from studio.engine.answers import Answer, ask_base
from studio.engine.devices import pick_device, pick_dtype, set_threads
from studio.engine.job import JobContext
from studio.engine.models.load import load_base
from studio.errors import DataError
from studio.models import require
from studio.probes.likeness import loops, words_of
from studio.store import dataset_versions

MAX_NEW_TOKENS = 64
FEWEST_TRAINABLE = 4
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)[\"')\]]*|[。！？][”」]?")


def run(job: JobContext) -> dict[str, Any]:
    """Write data/<dataset>.jsonl and its probes, and register them. Args: base, dataset, languages, limit,
    max_new_tokens (0 for a limit means none)."""
    args = job.args
    name = args.get("dataset", "general")
    prompts = general_prompts(args.get("languages") or ["en"])
    limit = int(args.get("limit") or 0)
    train, held_out = spread(prompts.train, limit), spread(prompts.held_out, limit)
    max_new_tokens = int(args.get("max_new_tokens") or MAX_NEW_TOKENS)

    job.phase("loading the base model")
    set_threads()
    device = pick_device()
    base = args.get("base", "starter")
    loaded = load_base(require(base), dtype=pick_dtype("auto", device), device=device)
    questions = [[{"role": "user", "content": prompt.text}] for prompt in train + held_out]
    job.phase("asking the base model", len(questions), "prompts")
    answers = ask_base(loaded, loaded.model, questions, max_new_tokens, job.progress, job.check_stop)

    rows = training_rows(train, answers[: len(train)])
    probes = general_probes(held_out, answers[len(train) :])
    if len(rows) < min(FEWEST_TRAINABLE, len(train)):
        raise DataError(
            f"Only {len(rows)} of {len(train)} answers of {base!r} can be trained on; the others were cut or loop.",
            "Choose other languages, raise max_new_tokens, or import general conversations of your own.",
        )
    shares = usable_shares(train, answers[: len(train)])
    origin = {"base": base, "languages": list(shares), "limit": limit, "max_new_tokens": max_new_tokens}
    origin |= {"usable_shares": shares}
    made_by = f"answered by {base}"
    dataset_versions.save(job.folder, name, rows, "general", origin | {"job_id": job.id}, probes, made_by)
    result = {"dataset": name, "num_rows": len(rows), "num_probes": len(probes), "num_left_out": len(train) - len(rows)}
    return result | {"usable_shares": shares}


def spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts taken evenly from the whole list, so that every kind is there; all for 0."""
    if limit <= 0 or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def training_rows(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Conversation]:
    """One row for each answer that is worth training on; see `usable_text`."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if text := usable_text(answer, prompt.text):
            meta = {"source": "general", "category": prompt.category, "language": prompt.language}
            rows.append(Conversation((Message("user", prompt.text), Message("assistant", text)), meta))
    return rows


def general_probes(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Held-out questions with the base's own answer, "" when it loops; `reference_finished`: it was not cut."""
    return [
        {
            "messages": [{"role": "user", "content": prompt.text}],
            "kind": "general",
            "intent": prompt.category,
            "language": prompt.language,
            "reference": "" if loops(answer.text) else answer.text,
            "reference_finished": answer.finished,
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def usable_text(answer: Answer, prompt: str) -> str:
    """The answer, cut back to its last whole sentence when the limit cut it; "" when nothing good remains.

    Small models loop or repeat the question in languages that they hardly know.
    """
    text = answer.text if answer.finished else _whole_sentences(answer.text)
    return "" if loops(answer.text) or words_of(text) == words_of(prompt) else text


def usable_shares(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, float]:
    """Language -> share of answers that can be trained on: low where the model does not speak the language."""
    usable: dict[str, list[bool]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        usable.setdefault(prompt.language, []).append(bool(usable_text(answer, prompt.text)))
    return {language: round(sum(marks) / len(marks), 3) for language, marks in usable.items()}


def _whole_sentences(text: str) -> str:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""
