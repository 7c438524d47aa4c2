"""How likely a model holds given answers: cross-entropy over their tokens, and divergence from the base's predictions.

The divergence is Kullback and Leibler's from base to tuned model, over the base's TOP likeliest tokens and all others
taken together. Taking tokens together can only make it smaller, so it is a lower bound; in return the base's side of it
is two kilobytes a token, and base and tuned model need not be in memory at the same time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studio.data.formats import Conversation, Message
from studio.data.tokens import IGNORE_INDEX, encode_conversation
from studio.engine.adapters import core_of
from studio.engine.cache import growing_cache
from studio.engine.generate import quiet
from studio.engine.models.load import LoadedModel
from studio.engine.virtual import has_virtual_tokens, read_virtual_tokens

ROWS_PER_FORWARD = 8  # logits of a row take (tokens x vocabulary) numbers
TOP = 256
LEAST_REST = 1e-8
Example = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Outlook:
    """What a model expects at each labelled token: the ids of its likeliest tokens and their log-probabilities, both
    (tokens, TOP)."""

    ids: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Fit:
    """Cross-entropy summed over the labelled tokens of an example, how many there are, and what was expected there."""

    loss: float
    num_tokens: int
    outlook: Outlook
    divergence: float | None = None


def example_of(loaded: LoadedModel, chat: Sequence[Mapping[str, str]], answer: str, finished: bool) -> Example:
    """Ids and labels of a chat with an answer; only that counts, a cut one without its end."""
    turns = [Message(turn["role"], turn["content"]) for turn in chat]
    whole = Conversation((*turns, Message("assistant", answer)))
    example = encode_conversation(whole, loaded.template, loaded.tokenizer, loss_on="last")
    labels = [IGNORE_INDEX if not finished and label in loaded.eos_ids else label for label in example.labels]
    return list(example.input_ids), labels


def fits(
    loaded: LoadedModel, model: nn.Module, examples: Sequence[Example], before: Sequence[Outlook | None] = ()
) -> list[Fit]:
    """One for each (ids, labels); with `before`, the base's outlook on the same labels, the divergence from it too."""
    logits, labels = _logits(loaded, model, examples)
    found = []
    for row, (row_logits, row_labels) in enumerate(zip(logits[:, :-1], labels[:, 1:], strict=True)):
        counted = row_labels != IGNORE_INDEX
        own, wanted = row_logits[counted].float(), row_labels[counted]
        loss = float(cross_entropy(own, wanted, reduction="sum"))
        expected = own.log_softmax(-1)
        base = before[row] if before else None
        apart = _divergence(base, expected) if base and len(base.ids) == len(expected) else None
        found.append(Fit(loss, len(wanted), _outlook(expected), apart))
    return found


def _outlook(expected: Tensor) -> Outlook:
    log_probabilities, ids = expected.topk(min(TOP, expected.shape[-1]), dim=-1)
    return Outlook(ids.int().cpu(), log_probabilities.cpu())


def _divergence(base: Outlook, expected: Tensor) -> float:
    """Summed over tokens, in nats."""
    ids, was = base.ids.to(expected.device).long(), base.log_probabilities.to(expected.device)
    now = expected.gather(-1, ids)
    rest_was, rest_now = (_rest(each) for each in (was, now))
    apart = (was.exp() * (was - now)).sum(-1) + rest_was * (rest_was.log() - rest_now.log())
    return max(0.0, float(apart.sum()))


def _rest(log_probabilities: Tensor) -> Tensor:
    """What is left to all other tokens."""
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=LEAST_REST)


def _logits(loaded: LoadedModel, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(rows, tokens, vocabulary) and labels (rows, tokens), both without what all rows begin with."""
    shared = 0 if has_virtual_tokens(model) else _common_beginning(examples)
    ids = _padded([ids[shared:] for ids, _ in examples], loaded.pad_id, loaded.device)
    labels = _padded([labels[shared:] for _, labels in examples], IGNORE_INDEX, loaded.device)
    mask = _padded([[1] * len(ids) for ids, _ in examples], 0, loaded.device)
    core, cache = core_of(model), growing_cache()
    with torch.no_grad(), quiet(model):
        mask = torch.cat([read_virtual_tokens(model, cache, [None] * len(examples)), mask], dim=1)
        if shared:  # a system message, mostly: read once for all rows
            beginning = torch.tensor([examples[0][0][:shared]], device=loaded.device)
            core(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_select_indices(torch.zeros(len(examples), dtype=torch.long, device=loaded.device))
        return core(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits, labels


def _common_beginning(examples: Sequence[Example]) -> int:
    """Number of tokens that all rows begin with, ending before the token that foretells a row's first label."""
    counted = [next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in examples]
    columns = zip(*(ids[: min(counted) - 1] for ids, _ in examples), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """(rows, longest), filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)
