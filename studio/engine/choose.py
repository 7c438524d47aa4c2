"""Which token comes next: the likeliest, or one drawn from the likely ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # logits divided by less may be infinite; nothing but the likeliest token is drawn long before
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How one row is decoded; a temperature below LEAST_TEMPERATURE takes the most likely token.

    `top_k`: only so many of the likeliest tokens, 0 for all. `repetition_penalty`: above 1, tokens that stand in the
    text already become less likely (Keskar et al. 2019, arXiv:1909.05858, as transformers computes it).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0


class Chooser:
    """Chooses the tokens of one row; its noise depends on the sampling's seed alone."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._noise = random.Random(sampling.seed) if sampling.temperature >= LEAST_TEMPERATURE else None
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else None

    @property
    def draws(self) -> bool:
        """Whether it needs noise."""
        return self._noise is not None

    def noise(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return self._noise.random() if self._noise else 0.0

    def see(self, token: int) -> None:
        """A token that the row got."""
        if self._seen is not None:
            self._seen.add(token)

    def penalize(self, logits: Tensor) -> None:
        """Make what was seen less likely: `logits` (vocabulary,), in place."""
        if self._seen is None:
            return
        ids = torch.tensor(sorted(self._seen), device=logits.device)
        scores, penalty = logits[ids], self.sampling.repetition_penalty
        logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """One token a row; `logits` (rows, vocabulary), float32, are changed where repetition is penalised."""
    for row, chooser in enumerate(choosers):
        chooser.penalize(logits[row])
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.draws]
    if drawn:
        noise = logits.new_tensor([choosers[row].noise() for row in drawn])
        tokens[drawn] = sample(logits[drawn], [choosers[row].sampling for row in drawn], noise)
    return tokens


def sample(logits: Tensor, samplings: list[Sampling], noise: Tensor) -> Tensor:
    """One token a row from the `top_k` most likely tokens, of these from those that together have `top_p`.

    `noise` in [0, 1) picks the place in the cumulated probability: equal distributions and noise, equal token.
    """
    temperature = logits.new_tensor([sampling.temperature for sampling in samplings]).unsqueeze(1)
    top_p = logits.new_tensor([sampling.top_p for sampling in samplings]).unsqueeze(1).clamp(min=SMALLEST)
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    probabilities = _first_k(probabilities, [sampling.top_k for sampling in samplings])
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0).cumsum(dim=-1)
    whole = kept[:, -1:]
    target = (noise.unsqueeze(1) * whole).minimum(whole.nextafter(torch.zeros_like(whole)))  # noise may round to 1
    place = torch.searchsorted(kept, target, right=True).clamp(max=logits.shape[-1] - 1)
    return order.gather(1, place).squeeze(1)


def _first_k(probabilities: Tensor, top_k: list[int]) -> Tensor:
    """Sorted probabilities of the first k tokens of each row, scaled to a sum of 1; 0 keeps a row as it is."""
    if not any(top_k):
        return probabilities
    limits = torch.tensor([k or probabilities.shape[-1] for k in top_k], device=probabilities.device).unsqueeze(1)
    kept = torch.where(torch.arange(probabilities.shape[-1], device=probabilities.device) < limits, probabilities, 0.0)
    cut = torch.tensor([bool(k) for k in top_k], device=probabilities.device).unsqueeze(1)
    return torch.where(cut, kept / kept.sum(dim=-1, keepdim=True), probabilities)
