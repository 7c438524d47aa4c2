"""Batched decoding with a KV cache: base and adapters in one batch, each row with its own sampling and noise.

A row's noise depends on its seed alone, so its text does not depend on its neighbours (up to rounding of the
batched arithmetic). Training goes on afterwards as if nothing had happened: see `quiet`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from studio.engine.adapters import core_of, is_adapter
from studio.engine.cache import growing_cache
from studio.engine.virtual import has_virtual_tokens, read_virtual_tokens

BASE_ADAPTER = "__base__"  # PEFT's name for a row that no adapter touches


@dataclass(frozen=True)
class Sampling:
    """How one row is decoded; temperature 0 takes the most likely token.

    `top_k`: only so many of the likeliest tokens, 0 for all. `repetition_penalty`: above 1, tokens that stand in the
    text already become less likely (Keskar et al. 2019, arXiv:1909.05858, as transformers computes it).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0


class Decoding:
    """A batch that is being decoded. Each `step` gives every row that still runs one more token.

    `prompts` are token ids, at least one a row; `adapter_names` names the adapter of each row, BASE_ADAPTER for none.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        if any(not prompt for prompt in prompts):
            raise ValueError("every prompt needs at least one token")
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.ended_by_eos = [False] * len(prompts)
        self._model = model
        self._samplings = samplings
        self._eos_ids = frozenset(eos_ids)
        self._adapter_names = adapter_names
        self._rows = list(range(len(prompts)))  # rows of the caller that are in the batch now
        self._ended: set[int] = {row for row, sampling in enumerate(samplings) if sampling.max_new_tokens < 1}
        self._noise = {row: random.Random(s.seed) for row, s in enumerate(samplings) if s.temperature > 0}
        self._read = {row: set(prompts[row]) for row, s in enumerate(samplings) if s.repetition_penalty != 1}
        self._cache = growing_cache()
        self._device = next(model.parameters()).device
        self._shared = self._common_beginning(prompts)
        own = [prompt[len(self._shared) :] for prompt in prompts]
        self._input, mask = _left_padded(own, pad_id, self._device)
        with quiet(model):
            before = read_virtual_tokens(model, self._cache, adapter_names or [None] * len(prompts))
        self._mask = torch.cat([before, mask], dim=1)

    @property
    def running(self) -> list[int]:
        """Rows that are not finished."""
        return [row for row in self._rows if row not in self._ended]

    def end(self, row: int) -> None:
        """Stop a row; what it has stays in `answers`."""
        self._ended.add(row)

    def step(self) -> list[int | None]:
        """The newest token of each row, None for finished ones; an end-of-text token ends its row and is not kept."""
        newest: list[int | None] = [None] * len(self.answers)
        self._drop_ended()
        if not self._rows:
            return newest
        tokens = self._choose(self._forward())
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            newest[row] = self._keep(row, token)
        self._input = tokens.unsqueeze(1)
        return newest

    def _keep(self, row: int, token: int) -> int | None:
        if token in self._eos_ids:
            self.ended_by_eos[row] = True
            self._ended.add(row)
            return None
        self.answers[row].append(token)
        if row in self._read:
            self._read[row].add(token)
        if len(self.answers[row]) >= self._samplings[row].max_new_tokens:
            self._ended.add(row)
        return token

    def _drop_ended(self) -> None:
        kept = [index for index, row in enumerate(self._rows) if row not in self._ended]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._cache = growing_cache()  # frees the memory of a batch that is over
            return
        index = torch.tensor(kept, device=self._mask.device)
        self._input, self._mask = self._input[index], self._mask[index]
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(index)

    def _common_beginning(self, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
        """What all prompts begin with (a system message, mostly): it is read once for all rows of one adapter."""
        if len(prompts) < 2 or len(set(self._adapter_names or ())) > 1 or has_virtual_tokens(self._model):
            return []
        shortest = min(len(prompt) for prompt in prompts) - 1  # each row keeps a token of its own to go on from
        first = prompts[0]
        same = (all(prompt[place] == first[place] for prompt in prompts) for place in range(shortest))
        return first[: sum(1 for _ in takewhile(bool, same))]

    def _read_shared(self) -> None:
        """Read the common beginning as one row, then give every row its keys and values."""
        ids = torch.tensor([list(self._shared)], device=self._device)
        self._run(ids, torch.ones_like(ids), self._rows[:1])
        self._cache.batch_select_indices(torch.zeros(len(self._rows), dtype=torch.long, device=self._device))
        self._mask = torch.cat([self._mask.new_ones(len(self._rows), len(self._shared)), self._mask], dim=1)
        self._shared = []

    def _forward(self) -> Tensor:
        """Logits of the next token, (rows, vocabulary), float32."""
        if self._shared:
            self._read_shared()
        logits = self._run(self._input, self._mask, self._rows)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)
        return logits[:, -1].float()

    def _run(self, ids: Tensor, mask: Tensor, rows: list[int]) -> Tensor:
        """Read `ids`; `mask` covers them and what was read before."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        names = [self._adapter_names[row] for row in rows] if self._adapter_names is not None else None
        with torch.no_grad(), quiet(self._model), adapters_of_rows(self._model, names):
            output = core_of(self._model)(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits

    def _choose(self, logits: Tensor) -> Tensor:
        for index, row in enumerate(self._rows):
            if row in self._read:
                self._penalize(logits[index], self._read[row], self._samplings[row].repetition_penalty)
        tokens = logits.argmax(dim=-1)
        sampled = [index for index, row in enumerate(self._rows) if row in self._noise]
        if sampled:
            rows = [self._rows[index] for index in sampled]
            noise = logits.new_tensor([self._noise[row].random() for row in rows])
            tokens[sampled] = _sample(logits[sampled], [self._samplings[row] for row in rows], noise)
        return tokens

    @staticmethod
    def _penalize(logits: Tensor, tokens: set[int], penalty: float) -> None:
        """Make tokens less likely, in place."""
        ids = torch.tensor(sorted(tokens), device=logits.device)
        scores = logits[ids]
        logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapter_names: list[str] | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt; the answers are token ids without the end-of-text token.

    `on_tokens` gets the newest token of each row, None for finished ones. `should_stop` ends all rows where they are.
    """
    samplings = [
        Sampling(max_new_tokens, temperature, top_p, random.Random(f"{seed}/{row}").getrandbits(63))
        for row in range(len(prompts))
    ]
    decoding = Decoding(model, prompts, samplings, eos_ids=eos_ids, pad_id=pad_id, adapter_names=adapter_names)
    while decoding.running and not (should_stop and should_stop()):
        newest = decoding.step()
        if on_tokens:
            on_tokens(newest)
    return decoding.answers


def next_logits(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, adapter_names: Sequence[str] | None = None
) -> Tensor:
    """Logits of the token after each prompt, (prompts, vocabulary), float32: computed as the first step of decoding."""
    samplings = [Sampling(1)] * len(prompts)
    return Decoding(model, prompts, samplings, eos_ids=(), pad_id=pad_id, adapter_names=adapter_names)._forward()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a block; afterwards every module is in the mode that it was in.

    bitsandbytes' 4-bit layers keep training mode: on a CPU they would repack their weights for inference, and no
    gradient would flow through them ever after. They have no dropout, so nothing else depends on their mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if _is_four_bit(type(module)):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@cache
def _is_four_bit(kind: type) -> bool:
    return any(parent.__name__ == "Linear4bit" for parent in kind.__mro__)


def adapters_of_rows(model: nn.Module, names: list[str] | None) -> AbstractContextManager[Any]:
    """Send each row of the batch through its adapter."""
    if names is None or not is_adapter(model) or has_virtual_tokens(model):
        return nullcontext()  # virtual tokens are in the cache
    return model.base_model._enable_peft_forward_hooks(adapter_names=names)


@contextmanager
def wearing(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """All rows through one adapter. In float32 it is folded into the weights for the time of the block: that is faster,
    and exact within rounding."""
    if adapter is None or not is_adapter(model):
        yield
        return
    model.set_adapter(adapter)
    is_lora = not has_virtual_tokens(model)
    in_float32 = next(model.parameters()).dtype == torch.float32
    folded = is_lora and in_float32 and not any(_is_four_bit(type(m)) for m in model.modules())
    if folded:
        model.merge_adapter()
    try:
        yield
    finally:
        if folded:
            model.unmerge_adapter()


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, longest prompt)."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _sample(logits: Tensor, samplings: list[Sampling], noise: Tensor) -> Tensor:
    """One token a row from the `top_k` most likely tokens, of these from those that together have `top_p`.

    `noise` in [0, 1) picks the place in the cumulated probability: equal distributions and noise, equal token.
    """
    temperature = logits.new_tensor([sampling.temperature for sampling in samplings]).unsqueeze(1)
    top_p = logits.new_tensor([sampling.top_p for sampling in samplings]).unsqueeze(1)
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    probabilities = _first_k(probabilities, [sampling.top_k for sampling in samplings])
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0).cumsum(dim=-1)
    target = noise.unsqueeze(1) * kept[:, -1:]
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
