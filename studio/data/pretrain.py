"""Continued pretraining: raw text becomes tokens that are all trained, joined with EOS and split into sequences."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from studio.data.segments import Segment, as_turns, mark_literals, split
from studio.errors import DataError


def document(text: str, eos_token: str, control_tokens: Collection[str] = ()) -> list[Segment]:
    """A text and the EOS that ends it, all trained; no BOS. Control tokens that the text writes stay text.

    Raises DataError when the tokenizer names no EOS: joined documents could not be told apart.
    """
    if not eos_token:
        raise DataError(
            "Raw text needs the tokenizer's EOS between documents, and it names none.",
            'Add "eos_token" to the model\'s tokenizer_config.json.',
        )
    [turn] = mark_literals(as_turns([{"role": "assistant", "content": text}]), control_tokens)
    return [*split(turn["content"], (), True), Segment(eos_token, True, part=1)]


def sequences(documents: Iterable[Sequence[int]], max_length: int) -> Iterator[list[int]]:
    """Join the ids of documents, each with its EOS, and yield sequences of `max_length`; the last may be shorter.

    No token is lost and none is repeated; memory holds one document and one sequence.
    """
    pending: list[int] = []
    for ids in documents:
        start = 0
        while start < len(ids):
            taken = ids[start : start + max_length - len(pending)]
            pending += taken
            start += len(taken)
            if len(pending) == max_length:
                yield pending
                pending = []
    if pending:
        yield pending
