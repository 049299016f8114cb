"""What a run keeps of its work, as those who do the work see it; here in memory, on the disk in unfinished.py.

What a piece of work is, and what a shelf holds, is for the room that does the work to say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from qquant.ranks import ALONE, Ranks
from qquant.shards import TensorSpec

_SHARE = 0.05
"""Of the run's time, that bringing tensors from memory to the disk may take."""
_LEAST_SECONDS = 5.0
"""Between two such times: what lies between is done again faster."""


class Shelf(Protocol):
    """Tensors by name, all known by dtype and shape beforehand."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep one tensor, or replace it."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; DamagedWorkError if it is not what was written."""

    def expect(self, name: str, tensor: Tensor) -> None:
        """Raise DamagedWorkError if a tensor is not this one."""

    def sync(self) -> None:
        """Wait until everything written here is on the disk."""


class Run:
    """A run that keeps nothing on disk: every piece is unfinished, shelves are in memory."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        """Begin.

        Args:
            ranks: the processes that do the run together; each makes the same calls in the same order.
        """
        self.ranks = ranks
        self.stop_asked = False
        """Of this rank; whether the run stops is ``may_stop``'s to say."""
        self._pieces: dict[str, Any] = {}
        self._shelves: dict[str, Shelf] = {}

    @property
    def lasting(self) -> bool:
        """Whether what is kept here is there after the end of the process."""
        return False

    def refuse_full_disk(self, needed: int) -> None:
        """Raise DoesNotFitError if all that the run will write, so many bytes, does not fit on the disk."""

    def finished(self, key: str) -> Any | None:
        """The JSON value kept for a piece of work that is finished, or None."""
        return self._pieces.get(key)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Finished pieces, in the order in which they were finished first."""
        yield from self._pieces.items()

    def keep(self, key: str, piece: Any) -> None:
        """Keep a finished piece, a JSON value; what it stands for must be written. None: it is unfinished again."""
        self._pieces[key] = piece

    def finish(self, key: str, piece: Any) -> None:
        """Keep a finished piece from which a later process can go on; StoppedError if a stop was asked for."""
        self.keep(key, piece)
        self.may_stop()

    def may_stop(self) -> None:
        """Raise StoppedError if a stop was asked for: all that is worth keeping is kept."""

    def shelf(self, name: str, specs: Mapping[str, TensorSpec]) -> Shelf:
        """The shelf of that name with what is on it, made with its disk space taken if it is not there."""
        return self._shelves.setdefault(name, _InMemory())

    def drop(self, name: str) -> None:
        """Give up a shelf and its space, if it is there."""
        self._shelves.pop(name, None)


class Pace:
    """When it is worth bringing to the disk what is in memory; begins now."""

    def __init__(self) -> None:
        """As if that had just been done, at no cost."""
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether the last time is long enough ago, beside what it took."""
        return time.monotonic() - self._last > max(_LEAST_SECONDS, self._cost / _SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While it is done."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - began


class _InMemory:
    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def expect(self, name: str, tensor: Tensor) -> None:
        assert torch.equal(self._tensors[name], tensor), f"{name} is of another moment"

    def sync(self) -> None:
        pass
