"""Memory of a cache's layer with places for tokens ahead, so that a step writes two rows and copies nothing.

Which caches may have it, and what writes the rows, is decoder_step.py's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_LEAST_SPARE_TOKENS, _SPARE_PART = 64, 8
"""Tokens that a cache gets room for ahead: so many, or this part of what it holds."""


class Room:
    """Memory of a cache's layer with places ahead: transformers' own copies all that is there for every token.

    A layer's keys and values are views of it, and whoever holds earlier ones keeps seeing the same numbers. A place is
    written only while the layer still has the very views that were made last, so that two caches with a common past
    cannot write to the same place.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Copy a cache's keys and values, [B, H, T, D] each."""
        batch, heads, tokens, _ = keys.shape
        self.capacity = tokens + max(_LEAST_SPARE_TOKENS, tokens // _SPARE_PART)
        self._keys, self._values = (one.new_empty(batch, heads, self.capacity, one.shape[3]) for one in (keys, values))
        self.keys, self.values = self._keys[:, :, :tokens], self._values[:, :, :tokens]
        self.keys.copy_(keys)
        self.values.copy_(values)

    def grow(self, tokens: int) -> None:
        """Views of so many tokens, the last of which is yet to be written."""
        self.keys, self.values = self._keys.narrow(2, 0, tokens), self._values.narrow(2, 0, tokens)


def with_place(held: Any) -> tuple[Tensor, Tensor]:
    """A cache's keys and values with a place for one more token at the end."""
    room = held.__dict__.get("_qquant_room")
    keys = held.keys
    tokens = keys.shape[2] + 1
    if room is None or room.keys is not keys or room.values is not held.values or tokens > room.capacity:
        room = held._qquant_room = Room(keys, held.values)
    room.grow(tokens)
    held.keys, held.values = room.keys, room.values
    return room.keys, room.values
