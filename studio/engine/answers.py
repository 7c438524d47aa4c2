"""What weights answer by themselves, greedily; asked once on this machine and remembered."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from studio import faults
from studio.engine.chat import TextStream, prompt_ids
from studio.engine.generate import Decoding, Row, Sampling, quiet
from studio.engine.models.load import LoadedModel
from studio.models import model_fingerprint
from studio.paths import system_folder

ROWS_PER_BATCH = 128  # weights are read once a step for all rows; more rows gave no more tokens a second on 2 cores


@dataclass(frozen=True)
class Answer:
    """`finished` is False when the answer was cut at the token limit."""

    text: str
    finished: bool


Messages = Sequence[dict[str, str]]
OnProgress = Callable[[int], None]


class AnswerMemory(AbstractContextManager["AnswerMemory"]):
    """Greedy answers of one set of weights at one token limit, kept in a file that grows line by line.

    A process that dies loses the answers that it had not finished, and no others.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = dict(_read(path))
        self._file: TextIO | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, max_new_tokens: int, weights: str = "") -> "AnswerMemory":
        """Of a base model, or of tuned `weights` (their hash) on it or in its place."""
        parts = [model_fingerprint(loaded.folder), loaded.template.fingerprint, str(loaded.dtype), max_new_tokens]
        parts += [weights] if weights else []
        parts += [loaded.stops] if loaded.stops else []
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        return cls(system_folder() / "answers" / f"{name}.jsonl")

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    @property
    def num_known(self) -> int:
        return len(self._known)

    def get(self, messages: Messages) -> Answer | None:
        return self._known.get(_key(messages))

    def put(self, messages: Messages, answer: Answer) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        key = _key(messages)
        self._known[key] = answer
        # A line that a killed process left half-written ends here.
        self._file.write("\n" + json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False))
        self._file.flush()
        faults.hit("answer")


def ask(
    loaded: LoadedModel,
    model: Any,
    questions: Sequence[Messages],
    max_new_tokens: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Answer]]:
    """Greedy answers as (number of the question, answer), each as soon as it is finished."""
    ids = [prompt_ids(loaded, messages) for messages in questions]
    for batch in _batches(ids):
        for row, answer in _ask_batch(loaded, model, [ids[index] for index in batch], max_new_tokens, check_stop):
            yield batch[row], answer


def ask_base(
    loaded: LoadedModel,
    model: Any,
    questions: Sequence[Messages],
    max_new_tokens: int,
    on_progress: OnProgress = lambda _: None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The base model's answers, in order; those it gave before are not asked for again."""
    with AnswerMemory.of(loaded, max_new_tokens) as memory:
        return ask_remembered(memory, loaded, model, questions, max_new_tokens, on_progress, check_stop)


def ask_remembered(
    memory: AnswerMemory,
    loaded: LoadedModel,
    model: Any,
    questions: Sequence[Messages],
    max_new_tokens: int,
    on_progress: OnProgress = lambda _: None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answers in the order of the questions; only those that the memory lacks are asked for, and go into it."""
    open_questions = [messages for messages in questions if memory.get(messages) is None]
    num_done = len(questions) - len(open_questions)
    on_progress(num_done)
    answers = ask(loaded, model, open_questions, max_new_tokens, check_stop)
    for number, (index, answer) in enumerate(answers, start=1):
        memory.put(open_questions[index], answer)
        on_progress(num_done + number)
    return [found for messages in questions if (found := memory.get(messages))]


def _ask_batch(
    loaded: LoadedModel,
    model: Any,
    ids: list[list[int]],
    max_new_tokens: int,
    check_stop: Callable[[], None],
) -> Iterator[tuple[int, Answer]]:
    rows = [Row(prompt, Sampling(max_new_tokens), loaded.eos_ids) for prompt in ids]
    streams = {row: TextStream(loaded, loaded.stops) for row in rows if loaded.stops}
    decoding = Decoding(model, rows, pad_id=loaded.pad_id)
    left = dict(enumerate(rows))
    while left:
        check_stop()
        with quiet(model):
            newest = decoding.step()
        for row, token in newest:
            if token is not None and row in streams:
                streams[row].feed(token)
                row.ended = row.ended or streams[row].stopped
        for number in [number for number, row in left.items() if row.ended]:
            row = left.pop(number)
            yield number, _answer(loaded, row, streams.get(row))


def _answer(loaded: LoadedModel, row: Row, stream: TextStream | None) -> Answer:
    if stream and stream.stopped:
        return Answer(stream.text.strip(), True)
    return Answer(loaded.tokenizer.decode(row.answer, skip_special_tokens=True).strip(), row.ended_by_eos)


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Questions of like length together: less padding."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), ROWS_PER_BATCH):
        yield order[start : start + ROWS_PER_BATCH]


def _key(messages: Iterable[dict[str, str]]) -> str:
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=True).encode()).hexdigest()


def _read(path: Path) -> Iterator[tuple[str, Answer]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            yield str(row["key"]), Answer(str(row["text"]), bool(row["finished"]))
        except (ValueError, KeyError, TypeError):
            continue  # an empty or half-written line: that question is asked again
