"""Rules on what is left of a row as tokens."""

from collections.abc import Callable, Iterator, Sequence

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW
from studio.data.tokens import Example
from studio.errors import DataError

Encode = Callable[[Sequence[Conversation]], Sequence[Example | DataError]]


class Lengths:
    """Rows the template refuses, rows that are cut, rows in which nothing is trained."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._untrained: list[int] = []
        self._num_refused = self._num_rows = 0

    def see(self, first_row: int, conversations: Sequence[Conversation]) -> Iterator[Finding]:
        """Findings on rows that follow each other, encoded together."""
        for row, example in enumerate(self._encode(conversations), start=first_row):
            self._num_rows += 1
            if isinstance(example, DataError):
                self._num_refused += 1
                yield Finding(row, "error", "template", str(example), DELETE_ROW)
            elif example.num_trained_tokens == 0:
                self._untrained.append(row)
            elif example.truncated:
                text = f"The row is too long; only its first {len(example.input_ids)} tokens are used (max_length)."
                yield Finding(row, "warning", "truncated", text)

    def finish(self) -> Iterator[Finding]:
        severity = "error" if len(self._untrained) + self._num_refused == self._num_rows else "warning"
        for row in self._untrained:
            text = "No token of this row is trained; it is left out."
            yield Finding(row, severity, "no_trained_tokens", text, DELETE_ROW)
