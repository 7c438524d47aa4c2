"""Blind votes counted by pair of columns, with the interval that so few or many votes leave open."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from studio.probes.paired import SEEN_BELOW, mcnemar, wilson
from studio.store.chats import Vote

FEWEST = 6  # fewer tell nothing, whatever they say: five of five come about by chance once in sixteen


@dataclass(frozen=True)
class Pair:
    """Two columns that were voted on together. Decided votes prefer one of the two; the others found both good or
    both bad, or something else better than either."""

    first: str
    second: str
    first_wins: int
    second_wins: int
    both_good: int
    both_bad: int

    @property
    def decided(self) -> int:
        return self.first_wins + self.second_wins

    @property
    def interval(self) -> tuple[float, float]:
        """95 % (Wilson) of the share of decided votes that prefer the first; (0, 1) when there is none."""
        return wilson(self.first_wins, self.decided)

    @property
    def preferred(self) -> Literal["first", "second", ""]:
        """Which one is preferred; "" while no preference can be told: the interval holds one half, or a fair coin falls
        as unevenly in 5 % of such tallies (exact; the interval alone says too much of few votes)."""
        low, high = self.interval
        if mcnemar(self.first_wins, self.second_wins) >= SEEN_BELOW:
            return ""
        return "first" if low > 0.5 else "second" if high < 0.5 else ""


def tally(votes: Iterable[Vote]) -> list[Pair]:
    """Every pair of columns that stood side by side, the one with the most votes first. In a pair, the one with more
    wins is named first."""
    votes = list(votes)
    asked = dict.fromkeys(pair for vote in votes for pair in combinations(sorted(vote.models), 2))
    pairs = [_pair(one, other, [vote for vote in votes if {one, other} <= set(vote.models)]) for one, other in asked]
    return sorted(pairs, key=lambda pair: (-pair.decided - pair.both_good - pair.both_bad, pair.first, pair.second))


def _pair(one: str, other: str, votes: Sequence[Vote]) -> Pair:
    wins = {model: sum(vote.choice == "better" and vote.model == model for vote in votes) for model in (one, other)}
    first, second = sorted((one, other), key=lambda model: -wins[model])
    return Pair(
        first=first,
        second=second,
        first_wins=wins[first],
        second_wins=wins[second],
        both_good=sum(vote.choice == "both_good" for vote in votes),
        both_bad=sum(vote.choice == "both_bad" for vote in votes),
    )
