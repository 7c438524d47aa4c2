"""Rules on what is left of a row as tokens."""

from collections.abc import Callable, Iterator, Sequence

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding
from studio.data.lint.fixes import DELETE_ROW
from studio.data.tokens import Example, Habits
from studio.errors import DataError

Encode = Callable[[Sequence[Conversation]], Sequence[Example | DataError]]


class Lengths:
    """Rows the template refuses, rows that are cut, rows in which nothing is trained.

    What the template does with every row is told too.
    """

    def __init__(self, encode: Encode, habits: Habits) -> None:
        self._encode, self._habits = encode, habits
        self._first_chat = 0
        self._untrained: list[int] = []
        self._num_refused = self._num_rows = 0

    def see(self, first_row: int, conversations: Sequence[Conversation]) -> Iterator[Finding]:
        """Findings on rows that follow each other, encoded together."""
        for row, conversation in enumerate(conversations, start=first_row):
            yield from self._tools(row, conversation)
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

    def _tools(self, row: int, conversation: Conversation) -> Iterator[Finding]:
        calls = [number for number, each in enumerate(conversation.messages, start=1) if each.tool_calls]
        if calls and not self._habits.writes_calls:
            text = f"The chat template leaves out the call of a tool in message {calls[0]}: an empty answer is trained."
            yield Finding(row, "error", "tools", text)
        elif conversation.meta.get("tools") and not self._habits.writes_tools:
            text = "The chat template leaves out the definitions of the row's tools."
            yield Finding(row, "warning", "tools", text)

    def finish(self) -> Iterator[Finding]:
        if self._first_chat and not self._habits.trains_end:
            text = "The chat template writes no end after an answer, here and in every row, so none is trained."
            yield Finding(self._first_chat, "warning", "no_trained_end", text)
        severity = "error" if len(self._untrained) + self._num_refused == self._num_rows else "warning"
        for row in self._untrained:
            text = "No token of this row is trained; it is left out."
            yield Finding(row, severity, "no_trained_tokens", text, DELETE_ROW)
