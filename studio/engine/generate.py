"""Batched decoding with a KV cache: base and adapters in one batch, each row with its own sampling and noise.

A row's noise depends on its seed alone, so its text does not depend on its neighbours (up to rounding of the
batched arithmetic). Rows leave when they end, and those of another batch may join between two tokens. Training goes
on afterwards as if nothing had happened: see `quiet`.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import torch
from torch import Tensor, nn

from studio.engine.adapters import core_of, is_adapter
from studio.engine.cache import growing_cache, join, keep
from studio.engine.choose import Chooser, Sampling, choose
from studio.engine.mixing import BASE_ADAPTER, RowAdapters
from studio.engine.virtual import has_virtual_tokens, read_virtual_tokens

__all__ = ["BASE_ADAPTER", "Decoding", "Row", "Sampling", "generate", "quiet", "wearing"]


@dataclass(eq=False)
class Row:
    """A text to be continued, and what has come of it.

    `prompt`: token ids, at least one. `adapter` names the adapter that answers, BASE_ADAPTER for none, None for the one
    that the model wears. An id of `eos_ids` ends the answer and is not kept.
    """

    prompt: Sequence[int]
    sampling: Sampling
    eos_ids: Collection[int] = ()
    adapter: str | None = None
    answer: list[int] = field(default_factory=list)
    ended_by_eos: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("every prompt needs at least one token")
        self.chooser = Chooser(self.sampling, self.prompt)
        self.ended = self.sampling.max_new_tokens < 1

    def take(self, token: int) -> int | None:
        """Keep a token that was chosen; None when it ended the text."""
        if token in self.eos_ids:
            self.ended = self.ended_by_eos = True
            return None
        self.answer.append(token)
        self.chooser.see(token)
        self.ended = len(self.answer) >= self.sampling.max_new_tokens
        return token


class Decoding:
    """A batch that is being decoded. Each `step` gives every row that still runs one more token.

    The model must be in evaluation mode (`quiet`) while it reads. `adapters` sends rows through those that they name.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Row], *, pad_id: int, adapters: RowAdapters | None = None
    ) -> None:
        self.rows = list(rows)  # in the order of the batch; those that ended leave at the next step
        self._core, self._adapters = core_of(model), adapters  # a wrapper of PEFT's may go while this runs
        self._device = next(model.parameters()).device
        self._shared = [] if has_virtual_tokens(model) else self._common_beginning()
        own = [row.prompt[len(self._shared) :] for row in self.rows]
        self._unread: Tensor | None  # (rows, tokens), with what `_unread_mask` covers of them
        self._unread, self._unread_mask = _left_padded(own, pad_id, self._device)
        self._cache = growing_cache()
        self._mask = self._unread_mask[:, :0]  # (rows, columns): 1 where a row has a token in the cache
        self._logits: Tensor | None = None  # (rows, vocabulary), after reading the prompts
        self._input: Tensor | None = None  # (rows, 1), the tokens that were chosen last
        if self.rows and has_virtual_tokens(model):
            with quiet(model):
                self._mask = read_virtual_tokens(model, self._cache, [row.adapter for row in self.rows])

    @property
    def running(self) -> list[Row]:
        """Rows that are not finished."""
        return [row for row in self.rows if not row.ended]

    @property
    def num_unread(self) -> int:
        """Tokens of the prompts that are still to be read, padding included."""
        return len(self._shared) + (0 if self._unread is None else self._unread.numel())

    def read(self, num_tokens: int | None = None) -> bool:
        """Read the prompts, or about so many tokens of them; True when all is read."""
        self._drop_ended()
        if not self.rows:
            return True
        if self._shared:
            self._read_shared()
        if self._unread is not None:
            width = max(1, num_tokens // len(self.rows)) if num_tokens else self._unread.shape[1]
            self._logits = self._run(self._unread[:, :width], self._unread_mask[:, :width])
            self._unread, self._unread_mask = self._unread[:, width:], self._unread_mask[:, width:]
            if not self._unread.shape[1]:
                self._unread = None
        return self._unread is None

    def step(self) -> list[tuple[Row, int | None]]:
        """The newest token of each row that ran; None for one that an end-of-text token ended."""
        self._drop_ended()
        if not self.rows:
            return []
        if self._input is None:
            logits = self.next_logits()
        else:
            logits = self._run(self._input, self._mask.new_ones(len(self.rows), 1))
        tokens = choose(logits, [row.chooser for row in self.rows])
        self._logits, self._input = None, tokens.unsqueeze(1)
        return [(row, row.take(token)) for row, token in zip(self.rows, tokens.tolist(), strict=True)]

    def next_logits(self) -> Tensor:
        """What `step` will choose from first: (rows, vocabulary), float32."""
        self.read()
        assert self._logits is not None
        return self._logits

    def absorb(self, other: "Decoding") -> None:
        """Take in another batch of the same model; both have read their prompts and chosen a token."""
        self._drop_ended()
        other._drop_ended()
        if not other.rows:
            return
        if not self.rows:
            self.rows, self._cache = other.rows, other._cache
            self._mask, self._input, self._unread = other._mask, other._input, None
            self._unread_mask = other._unread_mask
            return
        assert self._input is not None and other._input is not None
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._mask = torch.cat([_widened(self._mask, width), _widened(other._mask, width)])
        self._unread_mask = torch.cat([self._unread_mask, other._unread_mask])
        self._input = torch.cat([self._input, other._input])
        join(self._cache, other._cache)
        self.rows = self.rows + other.rows

    def _drop_ended(self) -> None:
        if not any(row.ended for row in self.rows):
            return
        kept = _filled_places([not row.ended for row in self.rows])
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            self._cache = growing_cache()  # frees the memory of a batch that is over
            return
        places = torch.tensor(kept, device=self._device)
        self._mask, self._unread_mask = self._mask[places], self._unread_mask[places]
        self._unread, self._input, self._logits = (
            None if each is None else each[places] for each in (self._unread, self._input, self._logits)
        )
        if self._cache.get_seq_length():
            self._mask = self._mask[:, int(self._mask.any(0).int().argmax()) :]
            keep(self._cache, kept, self._mask.shape[1])

    def _common_beginning(self) -> Sequence[int]:
        """What all prompts begin with (a system message, mostly): it is read once for all rows of one adapter."""
        if len(self.rows) < 2 or len({row.adapter for row in self.rows}) > 1:
            return []
        shortest = min(len(row.prompt) for row in self.rows) - 1  # each row keeps a token of its own to go on from
        first = self.rows[0].prompt
        same = (all(row.prompt[place] == first[place] for row in self.rows) for place in range(shortest))
        return first[: sum(1 for _ in takewhile(bool, same))]

    def _read_shared(self) -> None:
        """Read the common beginning as one row, then give every row its keys and values."""
        rows, self.rows = self.rows, self.rows[:1]
        mask, self._mask = self._mask, self._mask[:1]
        ids = torch.tensor([list(self._shared)], device=self._device)
        self._run(ids, torch.ones_like(ids))
        self.rows, self._shared = rows, []
        self._mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1])], dim=1)
        self._cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=self._device))

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits after reading `ids` of every row, (rows, vocabulary), float32. `mask` covers them."""
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self._adapters:
            self._adapters.send([row.adapter or BASE_ADAPTER for row in self.rows])
        # An index, not 1: a slice is not contiguous, and PyTorch would copy the whole head for each of its rows
        last = torch.tensor([ids.shape[1] - 1], device=self._device)
        with torch.no_grad():
            output = self._core(
                input_ids=ids,
                attention_mask=None if bool(self._mask.all()) else self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=last,
            )
        return output.logits[:, -1].float()


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
    rows = [
        Row(
            prompt,
            Sampling(max_new_tokens, temperature, top_p, random.Random(f"{seed}/{number}").getrandbits(63)),
            eos_ids,
            adapter_names[number] if adapter_names else None,
        )
        for number, prompt in enumerate(prompts)
    ]
    adapters = RowAdapters(model) if adapter_names and is_adapter(model) else None
    decoding = Decoding(model, rows, pad_id=pad_id, adapters=adapters)
    with quiet(model):
        while decoding.running and not (should_stop and should_stop()):
            newest = dict(decoding.step())
            if on_tokens:
                on_tokens([newest.get(row) for row in rows])
    if adapters:
        adapters.close()
    return [row.answer for row in rows]


def next_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    names: Sequence[str] | None = None,
    adapters: RowAdapters | None = None,
) -> Tensor:
    """Logits of the token after each prompt, (prompts, vocabulary), float32: computed as the first step of decoding."""
    rows = [
        Row(prompt, Sampling(1), adapter=name)
        for prompt, name in zip(prompts, names or [None] * len(prompts), strict=True)
    ]
    with quiet(model):
        return Decoding(model, rows, pad_id=pad_id, adapters=adapters).next_logits()


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


@contextmanager
def wearing(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """All rows through one adapter. In float32 it is folded into the weights for the time of the block: that is faster,
    and exact within rounding. In other formats it is computed as a server computes it."""
    if adapter is None or not is_adapter(model):
        yield
        return
    model.set_adapter(adapter)
    is_lora = not has_virtual_tokens(model)
    in_float32 = next(model.parameters()).dtype == torch.float32
    folded = is_lora and in_float32 and not any(_is_four_bit(type(m)) for m in model.modules())
    mixing = RowAdapters(model) if is_lora and not folded else None
    if folded:
        model.merge_adapter()
    elif mixing:
        mixing.wear(adapter)
    try:
        yield
    finally:
        if folded:
            model.unmerge_adapter()
        elif mixing:
            mixing.close()


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, longest prompt)."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids_and_mask = torch.tensor([ids, mask], dtype=torch.long, device=device).view(2, len(prompts), longest)
    return ids_and_mask[0], ids_and_mask[1]


def _widened(mask: Tensor, width: int) -> Tensor:
    """With zeros on the left."""
    return torch.cat([mask.new_zeros(len(mask), width - mask.shape[1]), mask], dim=1)


def _filled_places(stays: Sequence[bool]) -> list[int]:
    """Which row stands in each place when those that leave are replaced by the last ones."""
    kept = [place for place, stay in enumerate(stays) if stay]
    late = [place for place in kept if place >= len(kept)]
    return [place if stays[place] else late.pop() for place in range(len(kept))]
