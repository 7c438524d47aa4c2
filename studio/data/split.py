"""Which rows of a source are trained and which are kept out to measure: the same for the trainer and for the pages.

Rows that say nearly the same stay on one side, for a loss on a row whose twin was trained measures memory.
"""

import random

import numpy as np
from numpy.typing import NDArray

from studio.data import mix
from studio.data.alike import groups
from studio.data.cache import TokenCache
from studio.data.token_files import StoredRows


def split(tokens: TokenCache, name: str, valid_share: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """The rows of source `name` with a trained token: (those that are trained, those kept out of training).

    Fewer are kept out than asked for, or none, where the rows come in groups of too many that are alike.
    """
    usable = tokens.trainable()
    wanted = mix.num_valid_rows(len(usable), valid_share)
    is_trained = np.ones(len(usable), dtype=bool)
    if wanted:
        group_of = groups(tokens.files)[tokens.files.example_numbers(usable.rows)]
        is_trained[choose(group_of, wanted, random.Random(f"{seed}-{name}-valid"))] = False
    return StoredRows(usable.files, usable.rows[is_trained]), StoredRows(usable.files, usable.rows[~is_trained])


def choose(group_of: NDArray[np.int32], wanted: int, chance: random.Random) -> NDArray[np.int64]:
    """Rows of whole groups, `wanted` of them if some groups add up to it, in order.

    Where every group is larger than that, one of the smallest is taken, if half of the rows remain.
    """
    names, sizes = np.unique(group_of, return_counts=True)
    order = list(range(len(names)))
    chance.shuffle(order)
    taken, left = [], wanted
    for place in order:
        if sizes[place] <= left:
            taken.append(names[place])
            left -= int(sizes[place])
        if not left:
            break
    smallest = min(order, key=lambda place: sizes[place])
    if not taken and sizes[smallest] <= len(group_of) // 2:
        taken = [names[smallest]]
    return np.flatnonzero(np.isin(group_of, taken))
