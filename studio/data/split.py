"""Which rows of a source are trained and which are kept out to measure: the same for the trainer and for the pages."""

import random

import numpy as np

from studio.data import mix
from studio.data.cache import TokenCache
from studio.data.token_files import StoredRows


def split(tokens: TokenCache, name: str, valid_share: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """The rows of source `name` with a trained token: (those that are trained, those kept out of training)."""
    usable = tokens.trainable()
    wanted = mix.num_valid_rows(len(usable), valid_share)
    kept_out = sorted(random.Random(f"{seed}-{name}-valid").sample(range(len(usable)), wanted))
    is_trained = np.ones(len(usable), dtype=bool)
    is_trained[kept_out] = False
    return StoredRows(usable.files, usable.rows[is_trained]), StoredRows(usable.files, usable.rows[~is_trained])
