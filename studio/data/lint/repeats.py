"""Rules on rows that repeat: equal, nearly equal, and the same question with answers that disagree."""

import re
import zlib
from collections.abc import Iterator
from typing import Any

from studio.data.conversation import Conversation
from studio.data.lint.findings import Finding, shown_rows
from studio.data.lint.fixes import DELETE_DUPLICATES
from studio.data.lint.turns import is_identity
from studio.data.phrasings import normalise

SHOWN_ROWS = 10
CLAIMED_NAME = re.compile(
    r"(?:\b(?:I am|I'm|I’m|[Mm]y name is|[Cc]all me)\s+([A-Z][\w-]*)|(?:我叫|我的名字是)\s*([^\W_]{1,12}))"
)
YES_OR_NO = re.compile(r"\s*(?:(yes|correct|true|是的|对|正确)|(no|incorrect|false|不是|不对|错误))\b", re.IGNORECASE)
MOST_SHORT_WORDS, MOST_SHORT_CHARACTERS = 4, 40
WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
NUM_HASHES = 64
BANDS, ROWS_PER_BAND = 10, 6  # pairs that are 85 % alike meet in a band 99 times of 100
ALIKE = 0.85
FEWEST_SHINGLES = 16  # in shorter texts one word more or less decides
MOST_WORDS = 2_000
MOST_KNOWN_WORDS = 500_000
BLOCK_ROWS = 4_096

Aspects = tuple[str, str, str]


class Duplicates:
    """Rows with equal messages. Remembers a number for each different row."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self._repeats: dict[int, list[int]] = {}
        self._numbers: dict[int, int] = {}

    def see(self, row: int, conversation: Conversation) -> bool:
        """Whether an equal row came before."""
        first = self._first.setdefault(hash(conversation.messages), row)
        if first == row:
            return False
        rows = self._repeats.setdefault(first, [first])
        self._numbers[first] = self._numbers.get(first, 1) + 1
        if len(rows) < SHOWN_ROWS:
            rows.append(row)
        return True

    def finish(self) -> Iterator[Finding]:
        for first, rows in self._repeats.items():
            number = self._numbers[first]
            text = f"The same conversation stands in {number} rows: {shown_rows(rows, number)}."
            yield Finding(first, "warning", "duplicate", text, DELETE_DUPLICATES, tuple(rows[1:]))


class Contradictions:
    """The same question with answers that cannot all be right: other names, yes and no, other short facts."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, Aspects]] = {}
        self._against: dict[int, list[tuple[int, str]]] = {}

    def see(self, row: int, conversation: Conversation) -> None:
        messages = conversation.messages
        if conversation.kind != "chat" or len(messages) < 2 or messages[-1].tool_calls:
            return
        question = tuple(normalise(message.content) for message in messages[:-1])
        said = aspects(messages[-1].content)
        if not any(said) or not any(question):
            return
        first, before = self._first.setdefault(hash(question), (row, said))
        if against := disagree(before, said):
            told = self._against.setdefault(first, [(first, against[0])])
            if len(told) < SHOWN_ROWS and against[1] not in (words for _, words in told):
                told.append((row, against[1]))

    def finish(self) -> Iterator[Finding]:
        for first, told in self._against.items():
            words = ", ".join(f"{words} (row {row})" for row, words in told[:5])
            text = f"The same question is answered differently: {words}."
            yield Finding(first, "warning", "contradiction", text, others=tuple(row for row, _ in told[1:]))


def aspects(answer: str) -> Aspects:
    """(name claimed, yes or no, the whole answer when it is short), each "" where the answer has none."""
    head = answer[:400]
    name = CLAIMED_NAME.search(head)
    verdict = YES_OR_NO.match(head)
    words = WORD.findall(normalise(answer)) if len(answer) <= MOST_SHORT_CHARACTERS else []
    short = " ".join(words) if len(words) <= MOST_SHORT_WORDS else ""
    return (
        (name[1] or name[2]) if name else "",
        ("yes" if verdict[1] else "no") if verdict else "",
        "" if name else short,
    )


def disagree(one: Aspects, other: Aspects) -> tuple[str, str] | None:
    """What the two say that cannot both be right; None when they may agree."""
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        if mine and theirs:
            return (mine, theirs) if mine != theirs else None
    mine, theirs = one[2], other[2]
    return (mine, theirs) if mine and theirs and set(mine.split()).isdisjoint(theirs.split()) else None


class _WordHashes(dict[str, int]):
    """The same number for a word in every process; computed once."""

    def __missing__(self, word: str) -> int:
        number = self[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return number


class NearDuplicates:
    """Rows that are nearly the same by MinHash over word triples. Keeps 256 bytes a row.

    Rows are compared with the first of those that share a band with them, so the time grows with the number of
    rows only, however many resemble each other.
    """

    def __init__(self) -> None:
        import numpy  # with scipy behind datasketch a second to load: only when rows are compared
        from datasketch import MinHash

        self._np = numpy
        self._minhash = MinHash(num_perm=NUM_HASHES, hashfunc=int, scheme="affine32")
        self._hashes = _WordHashes()
        self._blocks: list[Any] = []
        self._block = numpy.empty((BLOCK_ROWS, NUM_HASHES), dtype=numpy.uint32)
        self._rows: list[int] = []

    def see(self, row: int, conversation: Conversation) -> None:
        if is_identity(conversation):
            return  # built from phrasings that resemble each other on purpose
        shingles = self._shingles(conversation)
        if len(shingles) < FEWEST_SHINGLES:
            return
        self._minhash.clear()
        self._minhash.update_batch(shingles)
        place = len(self._rows) % BLOCK_ROWS
        if self._rows and place == 0:
            self._blocks.append(self._block.copy())
        self._block[place] = self._minhash.hashvalues
        self._rows.append(row)

    def _shingles(self, conversation: Conversation) -> list[int]:
        """Hashes of all triples of words; a Chinese character counts as a word."""
        text = "\n".join(message.content for message in conversation.messages if message.role != "system")
        words = WORD.findall(text[: 16 * MOST_WORDS].casefold())[:MOST_WORDS]
        if len(words) < FEWEST_SHINGLES + 2:
            return []
        np = self._np
        if len(self._hashes) > MOST_KNOWN_WORDS:
            self._hashes.clear()
        hashes = np.array(list(map(self._hashes.__getitem__, words)), np.uint32)
        triples = hashes[:-2] * np.uint32(2_654_435_761) ^ hashes[1:-1] * np.uint32(40_503) ^ hashes[2:]
        found: list[int] = triples.tolist()
        return found

    def finish(self) -> Iterator[Finding]:
        for rows, alike in self._groups():
            shown = shown_rows(rows[:SHOWN_ROWS], len(rows))
            text = f"Rows {shown} say nearly the same (about {alike:.0%} of their word triples)."
            yield Finding(rows[0], "warning", "near_duplicate", text, others=tuple(rows[1:SHOWN_ROWS]))

    def _groups(self) -> Iterator[tuple[list[int], float]]:
        """(rows, smallest likeness found) of each group."""
        parents: dict[int, int] = {}
        likeness: dict[int, float] = {}
        for one, other, alike in self._pairs():
            first, second = sorted((_root(parents, one), _root(parents, other)))
            parents[second] = first
            parents.setdefault(first, first)
            known = min(likeness.pop(second, 1.0), likeness.get(first, 1.0))
            likeness[first] = min(known, alike)
        groups: dict[int, list[int]] = {}
        for place in sorted(parents):
            groups.setdefault(_root(parents, place), []).append(self._rows[place])
        for root, rows in groups.items():
            yield rows, likeness[root]

    def _pairs(self) -> Iterator[tuple[int, int, float]]:
        """Places of rows that are alike, each with the first of its bucket, band by band."""
        if len(self._rows) < 2:
            return
        np = self._np
        filled = (len(self._rows) - 1) % BLOCK_ROWS + 1
        signatures = np.concatenate([*self._blocks, self._block[:filled]])
        for band in range(BANDS):
            columns = signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND]
            keys = np.zeros(len(signatures), dtype=np.uint64)
            for column in columns.T:
                keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(29)
            order = np.argsort(keys, kind="stable")
            begins = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
            firsts = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
            yield from self._alike(signatures, firsts[~begins], order[~begins])

    def _alike(self, signatures: Any, firsts: Any, others: Any) -> Iterator[tuple[int, int, float]]:
        for start in range(0, len(firsts), BLOCK_ROWS):
            one, other = firsts[start : start + BLOCK_ROWS], others[start : start + BLOCK_ROWS]
            alike = (signatures[one] == signatures[other]).mean(axis=1)
            for place in self._np.nonzero(alike >= ALIKE)[0].tolist():
                yield int(one[place]), int(other[place]), float(alike[place])


def _root(parents: dict[int, int], place: int) -> int:
    root = place
    while parents.get(root, root) != root:
        root = parents[root]
    while parents.get(place, place) != root:
        parents[place], place = root, parents[place]
    return root
