"""Virtual tokens: what prompt and prefix tuning learn stands before every text, and is no part of the base's weights.

Prompt tuning learns their embeddings, prefix tuning their keys and values in every layer. The base is computed as it
is; PEFT keeps what is learned, and here it is put before a batch (training) or into the cache (reading and answering).
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.cache_utils import Cache


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether what the model wears is prompt or prefix tuning."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def with_virtual_tokens(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A base model's inputs (input_ids, position_ids: (rows, width)) with the active virtual tokens before each row.

    As PEFT's own forward pass does it, with positions: the hidden states of a row are the last `width` of the output.
    """
    if not has_virtual_tokens(model):
        return inputs
    rows, width = inputs["input_ids"].shape
    num_virtual = model.active_peft_config.num_virtual_tokens
    positions = torch.arange(num_virtual + width, device=inputs["input_ids"].device).expand(rows, -1)
    if _is_prefix(model):
        states = model.get_prompt(rows, max_cache_len=num_virtual + width)
        return {**inputs, "position_ids": positions[:, num_virtual:], "past_key_values": states}
    embedded = model.word_embeddings(inputs["input_ids"])
    both = torch.cat([model.get_prompt(rows).to(embedded.dtype), embedded], dim=1)
    return {**inputs, "input_ids": None, "inputs_embeds": both, "position_ids": positions}


@torch.no_grad()
def read_virtual_tokens(model: nn.Module, cache: Cache, names: Sequence[str | None]) -> Tensor:
    """Put the virtual tokens of each row's adapter into an empty cache; None stands for the active one.

    Returns the mask over them, (rows, longest), with zeros in rows that have fewer, or none at all (the base).
    """
    device = next(model.parameters()).device
    if not has_virtual_tokens(model):
        return torch.zeros(len(names), 0, dtype=torch.long, device=device)
    worn = [model.active_adapter if name is None else name for name in names]
    counts = [model.peft_config[n].num_virtual_tokens if n in model.peft_config else 0 for n in worn]
    learned = torch.nn.utils.rnn.pad_sequence(
        [_learned(model, name) for name in worn], batch_first=True, padding_side="left"
    )
    longest = max(counts)
    mask = torch.tensor([[0] * (longest - count) + [1] * count for count in counts], device=device)
    if longest == 0:
        return mask.view(len(names), 0)
    core = model.get_base_model()
    learned = learned.to(core.get_input_embeddings().weight.dtype)
    if not _is_prefix(model):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        core(inputs_embeds=learned, attention_mask=mask, position_ids=positions, past_key_values=cache,
             use_cache=True, logits_to_keep=1)  # fmt: skip
        return mask
    settings = model.active_peft_config
    heads, layers = settings.num_attention_heads, settings.num_layers
    by_layer = learned.view(len(worn), longest, 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
    for layer in range(layers):  # as PEFT lays them out: keys and values of a layer follow each other
        cache.update(by_layer[2 * layer], by_layer[2 * layer + 1], layer)
    return mask


def _is_prefix(model: nn.Module) -> bool:
    return model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def _learned(model: nn.Module, name: str) -> Tensor:
    """(virtual tokens, width) of an adapter; none for the base."""
    if name in model.prompt_encoder:
        return model.prompt_encoder[name].embedding.weight
    return next(iter(model.prompt_encoder.values())).embedding.weight[:0]
