"""Memory of a cache's layer with places for tokens ahead, so that a step writes its token and copies nothing.

Which caches may have it, and what writes the token, is decoder_step.py's.
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
        self.keys, self.values = self._views(tokens)
        self.keys.copy_(keys)
        self.values.copy_(values)

    def _views(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self._keys.narrow(2, 0, tokens), self._values.narrow(2, 0, tokens)

    def ahead(self) -> tuple[Tensor, Tensor]:
        """Views of one token more than the cache has."""
        return self._views(self.keys.shape[2] + 1)


def with_place(held: Any) -> tuple[Tensor, Tensor]:
    """A cache's keys and values with a place for one more token at the end; the cache itself stays as it is."""
    room = held.__dict__.get("_qquant_room")
    keys, values = held.keys, held.values
    if room is None or room.keys is not keys or room.values is not values or keys.shape[2] == room.capacity:
        room = held._qquant_room = Room(keys, values)
        held.keys, held.values = room.keys, room.values  # the same numbers
    found: tuple[Tensor, Tensor] = room.ahead()
    return found


def take_place(held: Any, keys: Tensor, values: Tensor) -> None:
    """Let a cache have what ``with_place`` gave for it, the place being written."""
    room = held._qquant_room
    held.keys, held.values = room.keys, room.values = keys, values
