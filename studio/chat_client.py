"""Talks to the model server: connection, models, streamed answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Connection:
    """Where a model server answers, and the token it wants."""

    url: str
    token: str
