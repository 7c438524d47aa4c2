"""The keys and values of tokens that were read, with room for those to come."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM_AHEAD = 64


class GrowingLayer(DynamicLayer):
    """Writes new tokens in place. transformers' own layer copies all it has for every token: a third of the time."""

    _key_room: Tensor
    _value_room: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, (rows, heads, tokens, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room, self._value_room = key_states[..., :0, :], value_states[..., :0, :]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if end > self._key_room.shape[-2]:
            self._key_room = _with_room(self._key_room[..., :begin, :], end + ROOM_AHEAD + end // 2)
            self._value_room = _with_room(self._value_room[..., :begin, :], end + ROOM_AHEAD + end // 2)
        self._key_room[..., begin:end, :] = key_states
        self._value_room[..., begin:end, :] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        length = self.get_seq_length()
        self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = self._key_room[..., :length, :], self._value_room[..., :length, :]


def growing_cache() -> Cache:
    """A cache for any model whose layers all attend to what came before."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _with_room(states: Tensor, room: int) -> Tensor:
    rows, heads, length, width = states.shape
    wider = torch.empty(rows, heads, room, width, dtype=states.dtype, device=states.device)
    wider[..., :length, :] = states
    return wider
