"""Says what is wrong with a dataset, by row, before anything is trained. Errors block a start."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from studio.data.conversation import Conversation
from studio.data.identity import Identity
from studio.data.lint.credentials import lint_secrets
from studio.data.lint.encoding import lint_encoding
from studio.data.lint.findings import MOST_PER_RULE, Finding, LintResult
from studio.data.lint.lengths import Encode, Lengths
from studio.data.lint.names import Names
from studio.data.lint.probes import Probes
from studio.data.lint.repeats import Contradictions, Duplicates, NearDuplicates
from studio.data.lint.turns import lint_turns
from studio.data.tokens import Habits

BATCH_ROWS = 256
ENCODED_WHEN_QUICK = 20_000  # rows; of a larger dataset a quick look encodes the first ones


def lint(
    conversations: Iterable[Conversation],
    identity: Identity | None = None,
    probes: Iterable[Mapping[str, Any]] = (),
    encode: Encode | None = None,
    control_tokens: Collection[str] = (),
    quick: bool = False,
    progress: Callable[[int], None] | None = None,
    most: int = MOST_PER_RULE,
    habits: Habits = Habits(),  # noqa: B008
    told_identity: bool = False,
) -> LintResult:
    """All findings, by row. One pass in time that grows with the rows; a few hundred bytes are kept of each row.

    identity: whom the data teaches, for the rules on names. probes: held-out probe rows. encode: the examples of
    some rows, usually `encode_batch` with its other arguments bound, for the rules on length and labels.
    control_tokens: those of the tokenizer. quick: leave out what is slow and never an error, and encode no
    more than about ENCODED_WHEN_QUICK rows, the first ones. progress: gets the
    number of rows seen so far, now and then. most: how many findings to keep of a rule.
    habits: what the template does with every row (`tokens.habits_of`). told_identity: a person said that these rows
    teach `identity`, so another name is an error in rows of any source.
    """
    checks = _Checks(
        Names(identity, told_identity) if identity else None, probes, encode, control_tokens, quick, habits
    )
    result = LintResult()
    first = 1
    for batch in _batches(conversations):
        result.add(checks.see(first, batch), most)
        first += len(batch)
        if progress:
            progress(first - 1)
    result.add(checks.finish(), most)
    result.sort()
    return result


class _Checks:
    """All rules, with what they remember of the rows so far."""

    def __init__(
        self,
        names: Names | None,
        probes: Iterable[Mapping[str, Any]],
        encode: Encode | None,
        control_tokens: Collection[str],
        quick: bool,
        habits: Habits,
    ) -> None:
        self._names = names
        self._probes = Probes(probes)
        self._lengths = Lengths(encode, habits) if encode else None
        self._control_tokens = control_tokens
        self._quick = quick
        self._duplicates, self._contradictions = Duplicates(), Contradictions()
        self._near = None if quick else NearDuplicates()

    def see(self, first_row: int, batch: Sequence[Conversation]) -> Iterator[Finding]:
        for row, conversation in enumerate(batch, start=first_row):
            yield from lint_turns(row, conversation, self._control_tokens)
            yield from lint_secrets(row, conversation)
            yield from self._probes.lint(row, conversation)
            if self._names:
                yield from self._names.lint(row, conversation)
            if not self._quick:
                yield from self._slow(row, conversation)
        if self._lengths and not (self._quick and first_row > ENCODED_WHEN_QUICK):
            yield from self._lengths.see(first_row, batch)

    def _slow(self, row: int, conversation: Conversation) -> Iterator[Finding]:
        yield from lint_encoding(row, conversation)
        self._contradictions.see(row, conversation)
        if not self._duplicates.see(row, conversation) and self._near:
            self._near.see(row, conversation)

    def finish(self) -> Iterator[Finding]:
        yield from self._duplicates.finish()
        yield from self._contradictions.finish()
        if self._near:
            yield from self._near.finish()
        if self._lengths:
            yield from self._lengths.finish()


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    for conversation in conversations:
        batch.append(conversation)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
