"""Rules on what is left of a row as tokens."""

from collections.abc import Callable, Iterator, Sequence

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW
from studio.data.tokens import Example
from studio.errors import DataError

Encode = Callable[[Sequence[Conversation]], Sequence[Example | DataError]]


class Lengths:
    """Rows the template refuses, rows that are cut, rows in which nothing is trained.

    `trains_end`: whether something is trained after an answer (`tokens.trains_end`).
    """

    def __init__(self, encode: Encode, trains_end: bool = True) -> None:
        self._encode, self._trains_end = encode, trains_end
        self._first_chat = 0
        self._untrained: list[int] = []
        self._num_refused = self._num_rows = 0

    def see(self, first_row: int, conversations: Sequence[Conversation]) -> Iterator[Finding]:
        """Findings on rows that follow each other, encoded together."""
        for row, example in enumerate(self._encode(conversations), start=first_row):
            self._num_rows += 1
            if isinstance(example, DataError):
                self._num_refused += 1
                yield Finding(row, "error", "template", str(example), DELETE_ROW)
                continue
            if not example.is_document:
                self._first_chat = self._first_chat or row
            if example.num_trained_tokens == 0:
                self._untrained.append(row)
            elif example.truncated:
                text = f"The row is too long; only its first {len(example.input_ids)} tokens are used (max_length)."
                yield Finding(row, "warning", "truncated", text)

    def finish(self) -> Iterator[Finding]:
        if self._first_chat and not self._trains_end:
            text = "The chat template writes no end after an answer, here and in every row, so none is trained."
            yield Finding(self._first_chat, "warning", "no_trained_end", text)
        severity = "error" if len(self._untrained) + self._num_refused == self._num_rows else "warning"
        for row in self._untrained:
            text = "No token of this row is trained; it is left out."
            yield Finding(row, severity, "no_trained_tokens", text, DELETE_ROW)
