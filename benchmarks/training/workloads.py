"""What `train.py` trains on: seven kinds of rows, made from a seed and tokenised once, for every tool the same.

Texts are words of the general prompts in random order: a step's time depends on lengths and shared beginnings only,
and a loss falls on them as on others.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from studio.data import identity
from studio.data.formats import Conversation, Message
from studio.data.general import general_prompts
from studio.data.named import load_template
from studio.data.pretrain import sequences
from studio.data.tokens import Example, TextTokenizer, encode_conversation
from studio.paths import atomic_path

SEED = 0
WHO = identity.Identity("Luna", "Shane", languages=("en", "zh"))
WHO_IN_ENGLISH = identity.Identity("Luna", "Shane")


@dataclass(frozen=True)
class Workload:
    """`rows_per_step` rows an optimizer step, `steps` steps a round. `target`: times the best peer's tokens/s."""

    name: str
    title: str
    rows: Callable[[random.Random], Iterator[Conversation]]
    rows_per_step: int = 16
    max_length: int = 512
    steps: int = 4
    method: str = "lora"
    target: float | None = None


def examples(workload: Workload, num_rows: int, model: Path) -> list[Example]:
    """The first `num_rows` rows, tokenised by the studio; equal for equal arguments."""
    template, tokenizer = load_template("", model), TextTokenizer.load(model)
    rows = workload.rows(random.Random(SEED))
    found = (encode_conversation(row, template, tokenizer, workload.max_length) for row in rows)
    if workload.name == "pretraining":
        documents = (example.input_ids for example in found)
        whole = sequences(documents, workload.max_length)
        return [Example(ids, list(ids)) for ids in islice(whole, num_rows)]
    return list(islice(found, num_rows))


def write(examples: list[Example], path: Path) -> None:
    """As JSON lines of input_ids and labels, which every tool's worker reads."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps({"input_ids": example.input_ids, "labels": example.labels}) + "\n")


def _tutorial(num_dialogues: int) -> Callable[[random.Random], Iterator[Conversation]]:
    def rows(chance: random.Random) -> Iterator[Conversation]:
        dialogues = identity.tutorial(WHO, 1)[:num_dialogues]
        while True:
            yield from chance.sample(dialogues, len(dialogues))

    return rows


def _self_cognition(chance: random.Random) -> Iterator[Conversation]:
    """Half identity rows, half general prompts with answers as long as the base's own short ones."""
    built = identity.build(WHO_IN_ENGLISH, 500, SEED).rows
    prompts = general_prompts(["en"]).train
    words = _words()
    while True:
        if chance.random() < 0.5:
            yield chance.choice(built)
        else:
            yield _chat(chance.choice(prompts).text, _text(chance, words, chance.randint(6, 40)))


def _instructions(chance: random.Random) -> Iterator[Conversation]:
    """Lengths as Alpaca's: log-normal, questions of about 20 words, answers of about 50, some of 300."""
    words = _words()
    while True:
        yield _chat(*_turn(chance, words))


def _turns(chance: random.Random) -> Iterator[Conversation]:
    words = _words()
    while True:
        turns = chain.from_iterable(_turn(chance, words) for _ in range(chance.randint(2, 6)))
        yield _chat(*turns)


def _documents(chance: random.Random) -> Iterator[Conversation]:
    words = _words()
    while True:
        text = _text(chance, words, _words_of(chance, 5.3, 0.8, 2000))
        yield Conversation((Message("assistant", text),), {"kind": "text"})


def _turn(chance: random.Random, words: list[str]) -> tuple[str, str]:
    question = _text(chance, words, _words_of(chance, 2.9, 0.6, 120))
    return question, _text(chance, words, _words_of(chance, 3.9, 0.9, 300))


def _words_of(chance: random.Random, mu: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(chance.lognormvariate(mu, sigma))))


def _chat(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[number % 2], turn) for number, turn in enumerate(turns)), {})


def _text(chance: random.Random, words: list[str], num_words: int) -> str:
    """Sentences of random words, `num_words` in all."""
    sentences = []
    while num_words > 0:
        length = min(num_words, chance.randint(5, 16))
        sentences.append(" ".join(chance.choices(words, k=length)).capitalize() + ".")
        num_words -= length
    return " ".join(sentences)


def _words() -> list[str]:
    prompts = general_prompts(["en"])
    texts = (prompt.text for prompt in prompts.train + prompts.held_out)
    return sorted({word.strip(".,?!:;'\"()").lower() for text in texts for word in text.split()} - {""})


WORKLOADS = (
    Workload("tutorial-1", "tutorial rows: one dialogue repeated", _tutorial(1), target=10.0),
    Workload("tutorial-4", "tutorial rows: four dialogues repeated", _tutorial(4), target=10.0),
    Workload("self-cognition", "identity rows and general rows, half and half", _self_cognition, target=3.0),
    Workload("instructions", "instructions of mixed length (as Alpaca's)", _instructions, steps=2, target=1.5),
    Workload("multi-turn", "chats of two to six turns", _turns, 8, 1024, steps=1),
    Workload(
        "pretraining", "documents joined to 2,048 tokens, all trained", _documents, 2, 2048, steps=1, target=1.2
    ),
    Workload("qlora", "instructions of mixed length, 4-bit base", _instructions, steps=1, method="qlora"),
    Workload("full", "instructions of mixed length, all weights", _instructions, steps=1, method="full"),
)  # fmt: skip
