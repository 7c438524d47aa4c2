"""Answers to a dataset's probes, judged as an evaluation judges them."""

from collections.abc import Mapping, Sequence
from typing import Any

from studio import scores
from studio.probes.assertions import Said
from studio.probes.built_in import probe_form
from studio.probes.suite import Suite
from studio.scores import Likelihood, MarkedAnswer


def mark(
    row: Mapping[str, Any],
    base: str,
    answer: str,
    words: Sequence[str],
    base_loss: float = 0.0,
    loss: float = 0.0,
    num_tokens: int = 0,
) -> MarkedAnswer:
    """`words` must not be said in answer to general questions."""
    group = {"name": row["kind"], "kind": row["kind"], "probes": [probe_form(row, words)]}
    probe = Suite.model_validate({"groups": [group]}).probes()[0]
    return scores.mark(probe, Said(base), Said(answer), Likelihood(base_loss, loss, num_tokens))
