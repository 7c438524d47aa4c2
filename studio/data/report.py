"""What is in a dataset, in numbers: kinds, sources, turns, languages, lengths, trained tokens, duplicates."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from studio.data.conversation import Conversation
from studio.data.languages import language_of

BATCH_ROWS = 256
NUM_BINS = 16
MOST_SOURCES = 50
LOOKED_AT_CHARACTERS = 2_000


@dataclass(frozen=True)
class Size:
    """A row as tokens: how many are read, how many of them are trained, and whether it was cut."""

    num_tokens: int
    num_trained_tokens: int
    truncated: bool = False


@dataclass
class DatasetReport:
    """Counts are of rows. `lengths` is empty, and what rests on it 0, when no tokens were at hand.

    `histogram` has (from, below, rows) in tokens; `longest_row` counts from 1, 0 for none. `num_duplicates` are
    the rows that are equal to one before them.
    """

    num_rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    num_with_system: int = 0
    num_characters: int = 0
    num_duplicates: int = 0
    num_refused: int = 0
    num_truncated: int = 0
    num_untrained: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest_row: int = 0
    longest_tokens: int = 0
    longest_characters: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens, 0 to 1."""
        return self.num_trained_tokens / self.num_tokens if self.num_tokens else 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DatasetReport":
        """From what `dataclasses.asdict` made of it and JSON of that."""
        turns = {int(number): rows for number, rows in values["turns"].items()}
        return cls(**{**values, "turns": turns, "histogram": [tuple(each) for each in values["histogram"]]})


Measure = Callable[[Sequence[Conversation]], Sequence[Size | None]]


def report_on(
    conversations: Iterable[Conversation],
    measure: Measure | None = None,
    progress: Callable[[int], None] | None = None,
) -> DatasetReport:
    """The report, in one pass. Keeps one number for each different row and counts, nothing else.

    measure: the sizes of some rows, None for one that cannot be tokenised. progress: gets rows seen so far.
    """
    counting = _Counting()
    rows = iter(conversations)
    while batch := list(islice(rows, BATCH_ROWS)):
        sizes = measure(batch) if measure else [None] * len(batch)
        for conversation, size in zip(batch, sizes, strict=True):
            counting.add(conversation, size, measured=measure is not None)
        if progress:
            progress(counting.report.num_rows)
    return counting.finish()


class _Counting:
    def __init__(self) -> None:
        self.report = DatasetReport()
        self._seen: set[int] = set()
        self._kinds, self._sources = Counter[str](), Counter[str]()
        self._languages, self._turns, self._lengths = Counter[str](), Counter[int](), Counter[int]()

    def add(self, conversation: Conversation, size: Size | None, measured: bool) -> None:
        report, messages = self.report, conversation.messages
        report.num_rows += 1
        self._kinds[conversation.kind] += 1
        self._sources[self._source(conversation)] += 1
        self._turns[sum(message.role == "user" for message in messages)] += 1
        report.num_with_system += any(message.role == "system" for message in messages)
        self._languages[language_of(_text(conversation)[:LOOKED_AT_CHARACTERS])] += 1
        characters = sum(len(message.content) for message in messages)
        report.num_characters += characters
        mark = hash(messages)
        report.num_duplicates += mark in self._seen
        self._seen.add(mark)
        if size:
            self._size(size)
        elif measured:
            report.num_refused += 1
        self._longest(size.num_tokens if size else 0, characters)

    def _source(self, conversation: Conversation) -> str:
        """Named in the row's notes; beyond MOST_SOURCES different ones all others count as one."""
        source = str(conversation.meta.get("source") or "")
        return source if source in self._sources or len(self._sources) < MOST_SOURCES else "others"

    def _size(self, size: Size) -> None:
        self._lengths[size.num_tokens] += 1
        self.report.num_tokens += size.num_tokens
        self.report.num_trained_tokens += size.num_trained_tokens
        self.report.num_truncated += size.truncated
        self.report.num_untrained += not size.num_trained_tokens

    def _longest(self, num_tokens: int, characters: int) -> None:
        report = self.report
        if not report.longest_row or (num_tokens, characters) > (report.longest_tokens, report.longest_characters):
            report.longest_row, report.longest_tokens = report.num_rows, num_tokens
            report.longest_characters = characters

    def finish(self) -> DatasetReport:
        report = self.report
        report.kinds, report.sources = dict(self._kinds.most_common()), dict(self._sources.most_common())
        report.languages, report.turns = dict(self._languages.most_common()), dict(sorted(self._turns.items()))
        report.lengths, report.histogram = percentiles(self._lengths), histogram(self._lengths)
        return report


def _text(conversation: Conversation) -> str:
    """What is said, the start of every turn first in the order of turns."""
    return " ".join(message.content[:LOOKED_AT_CHARACTERS] for message in conversation.messages)


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Shortest, median, 90 and 99 % and longest of the lengths; empty for none."""
    total = lengths.total()
    if not total:
        return {}
    wanted = {"shortest": 1, "median": -(-total // 2), "p90": -(-total * 9 // 10), "p99": -(-total * 99 // 100)}
    found: dict[str, int] = {}
    passed = 0
    for length in sorted(lengths):
        passed += lengths[length]
        found |= {name: length for name, rank in wanted.items() if rank <= passed and name not in found}
    return found | {"longest": max(lengths)}


def histogram(lengths: Counter[int], num_bins: int = NUM_BINS) -> list[tuple[int, int, int]]:
    """(from, below, rows) of bins of equal, round width that cover all lengths; empty for none."""
    if not lengths:
        return []
    width = _round_width(max(lengths) + 1, num_bins)
    rows = Counter[int]()
    for length, number in lengths.items():
        rows[length // width] += number
    first, last = min(rows), max(rows)
    return [(place * width, (place + 1) * width, rows[place]) for place in range(first, last + 1)]


def _round_width(extent: int, num_bins: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50… that covers the extent with so many bins."""
    return next(width for width in _round_numbers() if width * num_bins >= extent)


def _round_numbers() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
