"""The keys and values of tokens that were read, with room for those to come and for rows that join later."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM_AHEAD = 64
MORE_ROWS = 1.5  # how many times as many rows there is room for when another one joins


class GrowingLayer(DynamicLayer):
    """Writes new tokens in place. transformers' own layer copies all it has for every token: a third of the time.

    The tokens of all rows end in the same column, so what is shown is a view of the room and what a row of few tokens
    has to its left is masked. Rows and columns that are over are left out of the view, not moved.
    """

    _key_room: Tensor
    _value_room: Tensor
    _num_rows: int
    _begin: int
    _end: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, (rows, heads, tokens, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room, self._value_room = key_states[..., :0, :], value_states[..., :0, :]
            self._num_rows, self._begin, self._end = key_states.shape[0], 0, 0
        if self._end + key_states.shape[-2] > self._key_room.shape[-2]:
            self._move(self._num_rows, self._width, key_states.shape[-2])
        end = self._end + key_states.shape[-2]
        self._key_room[: self._num_rows, :, self._end : end] = key_states
        self._value_room[: self._num_rows, :, self._end : end] = value_states
        self._end = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
        self._num_rows = len(indices)
        self._show()

    def keep(self, rows: Sequence[int], columns: int) -> None:
        """Keep these rows and the last `columns` columns.

        A row stays where it is or takes the place of one that is over; `rows` says which one stands in each place.
        """
        for place, row in enumerate(rows):
            if place != row:
                for room in (self._key_room, self._value_room):
                    room[place, :, self._begin : self._end] = room[row, :, self._begin : self._end]
        self._num_rows, self._begin = len(rows), self._end - columns
        self._show()

    def join(self, other: "GrowingLayer") -> None:
        """Take in another layer's rows below these. What a row has no tokens for is 0, so that nothing is NaN there."""
        num_rows, columns = self._num_rows + other._num_rows, max(self._width, other._width)
        if num_rows > self._key_room.shape[0] or columns > self._end:
            self._move(max(num_rows, int(self._num_rows * MORE_ROWS)), columns)
        begin = self._end - columns
        for room, states in ((self._key_room, other.keys), (self._value_room, other.values)):
            room[: self._num_rows, :, begin : self._begin] = 0
            room[self._num_rows : num_rows, :, begin : self._end - other._width] = 0
            room[self._num_rows : num_rows, :, self._end - other._width : self._end] = states
        self._num_rows, self._begin = num_rows, begin
        self._show()

    @property
    def _width(self) -> int:
        return self._end - self._begin

    def _move(self, num_rows: int, end: int, num_coming: int = 0) -> None:
        """Into a new room for `num_rows` rows, in which the tokens end in column `end` and others may follow."""
        columns = end + num_coming + ROOM_AHEAD + (end + num_coming) // 2
        begin = end - self._width
        for name in ("_key_room", "_value_room"):
            before = getattr(self, name)
            after = before.new_empty(num_rows, before.shape[1], columns, before.shape[3])
            after[: self._num_rows, :, begin:end] = before[: self._num_rows, :, self._begin : self._end]
            setattr(self, name, after)
        self._begin, self._end = begin, end

    def _show(self) -> None:
        shown = (slice(0, self._num_rows), slice(None), slice(self._begin, self._end))
        self.keys, self.values = self._key_room[shown], self._value_room[shown]


def growing_cache() -> Cache:
    """A cache for any model whose layers all attend to what came before."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def keep(cache: Cache, rows: Sequence[int], columns: int) -> None:
    """`GrowingLayer.keep` in every layer that was filled."""
    for layer in _filled(cache):
        layer.keep(rows, columns)


def join(cache: Cache, other: Cache) -> None:
    """`GrowingLayer.join` in every layer that was filled."""
    for layer, newcomers in zip(_filled(cache), _filled(other), strict=True):
        layer.join(newcomers)


def _filled(cache: Cache) -> list[GrowingLayer]:
    return [layer for layer in cache.layers if layer.is_initialized]
