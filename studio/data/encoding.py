"""Lines of a data file become examples, on all cores where a file is large: worker processes, results in order.

Run as a program it answers frames on its standard input, and ends with it. A frame is eight bytes of length and what
they announce: first the work as JSON, then lines; an answer is an `EncodedLines`. The same lines give the same
examples whoever encodes them, so the number of workers changes nothing in what is written.
"""

import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import psutil
from numpy.typing import NDArray

from studio.data.conversation import Conversation
from studio.data.named import NamedTemplate, Template
from studio.data.rows import parse
from studio.data.template import ChatTemplate
from studio.data.token_files import Block
from studio.data.tokens import Example, TextTokenizer, encode_each
from studio.errors import DataError
from studio.paths import REPOSITORY

BYTES_PER_WORKER = 8 * 2**20  # a worker takes about a second to start
MEMORY_PER_WORKER = 2**30
MOST_WORKERS = 8
LENGTH_BYTES = 8
TEMPLATES: dict[str, type[Template]] = {"ChatTemplate": ChatTemplate, "NamedTemplate": NamedTemplate}


@dataclass(frozen=True)
class Work:
    """What lines become examples with."""

    template: Template
    tokenizer: TextTokenizer
    max_length: int
    loss_on: str

    def to_json(self) -> bytes:
        template = {"class": type(self.template).__name__, **asdict(self.template)}
        tokenizer = self.tokenizer.to_json()
        return json.dumps([template, tokenizer, self.max_length, self.loss_on]).encode("ascii")

    @classmethod
    def from_json(cls, text: bytes) -> "Work":
        fields, tokenizer, max_length, loss_on = json.loads(text)
        template: Template = TEMPLATES[fields.pop("class")](**fields)
        if isinstance(template, NamedTemplate):  # JSON knows no tuples
            bos, ids = template.bos
            template = replace(template, stop=tuple(template.stop), bos=(bos, tuple(ids)))
        return cls(template, TextTokenizer.from_json(tokenizer), max_length, loss_on)


@dataclass(frozen=True)
class EncodedLines:
    """Examples of some lines: those of chats, those of documents (`is_document` says which lines are), in order.

    `error`: (line, message, hint) of the first line that cannot be used; then there are no examples.
    """

    chats: Block
    documents: Block
    is_document: NDArray[np.bool_]
    error: tuple[int, str, str] | None = None

    def to_bytes(self) -> bytes:
        arrays = [*self.chats.arrays(), *self.documents.arrays(), self.is_document]
        head = {"arrays": [(each.dtype.str, len(each)) for each in arrays], "error": self.error}
        return json.dumps(head).encode("ascii") + b"\n" + b"".join(each.tobytes() for each in arrays)

    @classmethod
    def from_bytes(cls, content: bytes) -> "EncodedLines":
        line, _, rest = content.partition(b"\n")
        head, arrays, start = json.loads(line), [], 0
        for kind, length in head["arrays"]:
            arrays.append(np.frombuffer(rest, kind, length, start))
            start += arrays[-1].nbytes
        return cls(Block(*arrays[:4]), Block(*arrays[4:8]), arrays[8], head["error"] and tuple(head["error"]))


def encode_lines(lines: Sequence[bytes], work: Work) -> EncodedLines:
    """The examples of canonical lines, in one process."""
    conversations: list[Conversation] = []
    error: tuple[int, DataError] | None = None
    for line in lines:
        try:
            conversations.append(_conversation(line))
        except DataError as refused:
            error = (len(conversations), refused)
            break
    examples: list[Example] = []
    for example in encode_each(conversations, work.template, work.tokenizer, work.max_length, work.loss_on):
        if isinstance(example, DataError):
            error = (len(examples), example)
            break
        examples.append(example)
    if error:
        nothing = Block.of([])
        return EncodedLines(nothing, nothing, np.zeros(0, bool), (error[0], error[1].message, error[1].hint))
    chats = Block.of([each for each in examples if not each.is_document])
    documents = Block.of([each for each in examples if each.is_document])
    return EncodedLines(chats, documents, np.array([each.is_document for each in examples], bool))


def _conversation(line: bytes) -> Conversation:
    value, problem = parse(line)
    if problem:
        raise DataError(problem, "Correct the row, or restore an earlier version of the dataset.")
    return Conversation.from_row(value, decoded=False)


def num_workers_for(num_bytes: int) -> int:
    """How many processes a file of that size is worth on this machine; 1 means this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().available // MEMORY_PER_WORKER
    return max(1, min(cores, memory, MOST_WORKERS, num_bytes // BYTES_PER_WORKER))


def encode_batches(batches: Iterable[list[bytes]], work: Work, num_workers: int) -> Iterator[EncodedLines]:
    """Each batch of lines encoded, in order, in bounded memory; with one worker in this process.

    Raises DataError when a worker ends before its work is done.
    """
    if num_workers < 2:
        yield from (encode_lines(batch, work) for batch in batches)
        return
    workers = [_Worker(work) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(lines: list[bytes]) -> EncodedLines:
        worker = idle.get()
        try:
            return worker.encode(lines)
        finally:
            idle.put(worker)

    pending: deque[Future[EncodedLines]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="encode") as threads:
        try:
            for batch in batches:
                pending.append(threads.submit(encode, batch))
                if len(pending) > 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            for worker in workers:
                worker.close()


class _Worker:
    """One process that encodes; it begins to load the tokenizer at once."""

    def __init__(self, work: Work) -> None:
        self._work: Work | None = work
        self._process = subprocess.Popen(
            [sys.executable, "-m", "studio.data.encoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

    def encode(self, lines: list[bytes]) -> EncodedLines:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._work is not None:
                _write_frame(self._process.stdin, self._work.to_json())
                self._work = None
            _write_frame(self._process.stdin, b"".join(lines))
            answer = _read_frame(self._process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise DataError(
                f"A process that tokenises ended before its work was done (exit code {self._process.wait()}).",
                "If memory ran out, close other programs; try again.",
            )
        return EncodedLines.from_bytes(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _write_frame(stream: BinaryIO | Any, content: bytes) -> None:
    stream.write(len(content).to_bytes(LENGTH_BYTES, "little"))
    stream.write(content)
    stream.flush()


def _read_frame(stream: BinaryIO | Any) -> bytes | None:
    """What a frame holds; None where the stream ends."""
    length = stream.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    content: bytes = stream.read(int.from_bytes(length, "little"))
    return content


def serve() -> None:
    """Answer until the input ends: with whoever asks, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand among the answers
    first = _read_frame(sys.stdin.buffer)
    work = Work.from_json(first) if first is not None else None
    while work is not None and (content := _read_frame(sys.stdin.buffer)) is not None:
        _write_frame(answers, encode_lines(content.removesuffix(b"\n").split(b"\n"), work).to_bytes())


if __name__ == "__main__":
    serve()
