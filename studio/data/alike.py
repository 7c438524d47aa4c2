"""Which rows say nearly the same, found on their tokens: rows of a group must not be both trained and measured.

Two rows belong together when they are equal, when what stands before their first answer is equal (the same question),
or when 85 % of their token triples are the same, by MinHash: min-wise hashes in bands, each pair that meets in a band
compared (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from studio.data.token_files import TokenFiles

BANDS, ROWS_PER_BAND = 6, 4  # pairs that are 85 % alike meet in a band 99 times of 100
ALIKE = 0.85
FEWEST_TRIPLES = 16  # in shorter texts one token more or less decides
BLOCK_TOKENS = 1 << 22
NOTHING = np.uint32(0xFFFFFFFF)
MULTIPLIERS = np.random.default_rng(0).integers(1, 2**31, BANDS * ROWS_PER_BAND, dtype=np.uint32) * 2 + 1


def groups(files: TokenFiles) -> NDArray[np.int32]:
    """A number for each different example, equal for those that are alike."""
    from scipy.sparse import coo_array  # half a second to load: only when rows are compared
    from scipy.sparse.csgraph import connected_components

    num_examples = files.num_examples
    pairs = [np.zeros((0, 2), dtype=np.int64), *_pairs(*_marks(files))]
    one, other = np.concatenate(pairs).T
    edges = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(num_examples, num_examples))
    return connected_components(edges, directed=False)[1]


def _marks(files: TokenFiles) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """(hash of the question, 0 for none; min-wise hashes, all equal for a text too short to compare), by example."""
    questions = np.zeros(files.num_examples, dtype=np.uint64)
    signatures = np.full((files.num_examples, len(MULTIPLIERS)), NOTHING)
    for first, ids, trained, starts in _blocks(files):
        last = first + len(starts)
        questions[first:last] = _question_hashes(ids, trained, starts)
        signatures[first:last] = _signatures(ids, starts)
    return questions, signatures


def _blocks(
    files: TokenFiles,
) -> Iterator[tuple[int, NDArray[np.uint32], NDArray[np.bool_], NDArray[np.int64]]]:
    """(first example, ids, trained, where each example starts) of neighbouring examples, without what all of the
    file's examples begin with: the words of a template say nothing about a row."""
    ends = files.ends()
    common = _common_beginning(files, ends)
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + BLOCK_TOKENS, side="right")))
        ids, trained = files.tokens(begin, int(ends[last - 1]))
        starts = np.concatenate([[0], ends[first : last - 1] - begin])
        kept = np.ones(len(ids), dtype=bool)
        for offset in range(common):
            kept[starts + offset] = False
        yield first, ids[kept], trained[kept], starts - common * np.arange(len(starts))
        first = last


def _common_beginning(files: TokenFiles, ends: NDArray[np.int64]) -> int:
    """Tokens that all examples begin with; each keeps one at least."""
    starts = np.concatenate([[0], ends[:-1]])
    shortest = int((ends - starts).min(initial=1 << 40)) - 1
    number = 0
    while number < shortest and (column := files.ids_at(starts + number)).size and (column == column[0]).all():
        number += 1
    return number if len(ends) > 1 else 0


def _question_hashes(
    ids: NDArray[np.uint32], trained: NDArray[np.bool_], starts: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A hash of the tokens before the first trained one; 0 where there are none."""
    places = np.arange(len(ids)) - np.repeat(starts, np.diff(starts, append=len(ids)))
    asked = np.add.reduceat(trained.astype(np.int64), starts)
    before = np.cumsum(trained) - np.repeat(np.cumsum(asked) - asked, np.diff(starts, append=len(ids)))
    is_question = before == 0
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= (places.astype(np.uint64) * np.uint64(2) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return np.add.reduceat(np.where(is_question, mixed, np.uint64(0)), starts)


def _signatures(ids: NDArray[np.uint32], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Min-wise hashes of the token triples of each example."""
    lengths = np.diff(starts, append=len(ids))
    triples = np.full(len(ids), NOTHING)
    if len(ids) > 2:
        parts = (ids[:-2] * np.uint32(2_654_435_761)) ^ (ids[1:-1] * np.uint32(40_503)) ^ (ids[2:] + np.uint32(7))
        triples[:-2] = parts * np.uint32(0x85EBCA6B)
    ends = starts + lengths
    crosses = np.zeros(len(ids), dtype=bool)
    for back in (1, 2):
        crosses[np.maximum(ends - back, starts)] = True
    found = np.empty((len(starts), len(MULTIPLIERS)), dtype=np.uint32)
    for number, factor in enumerate(MULTIPLIERS):
        hashed = (triples ^ (triples >> np.uint32(15))) * factor
        hashed ^= hashed >> np.uint32(13)
        hashed[crosses] = NOTHING
        found[:, number] = np.minimum.reduceat(hashed, starts)
    found[lengths < FEWEST_TRIPLES + 2] = NOTHING
    return found


def _pairs(questions: NDArray[np.uint64], signatures: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """(pairs, 2) of examples that belong together, each with the first that has its mark."""
    yield _same(questions, np.flatnonzero(questions))
    long_enough = np.flatnonzero((signatures != NOTHING).any(axis=1))
    for band in range(BANDS):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for column in signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].T:
            keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        met = _same(keys, long_enough)
        alike = (signatures[met[:, 0]] == signatures[met[:, 1]]).mean(axis=1)
        yield met[alike >= ALIKE]


def _same(keys: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """(pairs, 2): each place with the first one of an equal key."""
    order = places[np.argsort(keys[places], kind="stable")]
    if not len(order):
        return np.zeros((0, 2), dtype=np.int64)
    begins = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
    firsts = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return np.stack([firsts[~begins], order[~begins]], axis=1)
