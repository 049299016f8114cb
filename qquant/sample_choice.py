"""Which of many candidates become calibration samples: drawn at random, or spread over the source without copies.

Candidates are token ids; nothing is known of where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from qquant.errors import UsageError
from qquant.overlap import run_hashes

Select = Literal["random", "spread"]
"""How samples are chosen, see ``Choice``."""
_NEW_SHARE = 0.25
"""Of a sample's runs of tokens so many must be new: what has fewer is a copy with small changes, or repeats itself."""


def check_select(select: str) -> None:
    """Raise UsageError for a choice that there is not."""
    if select not in get_args(Select):
        raise UsageError(f"select must be {' or '.join(get_args(Select))}, got {select!r}; write one of these")


class Choice:
    """The choice of samples from one source; used once."""

    def __init__(self, wanted: int, select: Select, generator: torch.Generator) -> None:
        """Begin with no sample taken.

        Args:
            wanted: samples.
            select: "random": without replacement; "spread": one from each of ``wanted`` equal stretches, then from
                anywhere, and none that brings little that is new.
            generator: of the draw; the same seed makes the same choice.
        """
        self.wanted = wanted
        self._spread = select == "spread"
        self._generator = generator
        self._taken = 0
        self._seen: set[int] = set()
        self._short: set[tuple[int, ...]] = set()

    def order(self, count: int) -> Iterator[int]:
        """Yield candidates, 0 to ``count`` - 1, in the order in which they are to be tried, until enough are taken."""
        for index in self._order(count):
            if self._taken == self.wanted:
                return
            yield index

    def takes(self, ids: Tensor) -> bool:
        """Whether the candidate of these ids [T] is taken; then it is counted."""
        taken = not self._spread or self._brings_new(ids)
        self._taken += taken
        return taken

    def _order(self, count: int) -> list[int]:
        shuffled: list[int] = torch.randperm(count, generator=self._generator).tolist()
        if not self._spread:
            return shuffled
        first: dict[int, int] = {}
        for index in shuffled:
            first.setdefault(index * self.wanted // count, index)
        drawn = set(first.values())
        return [*(first[stretch] for stretch in sorted(first)), *(one for one in shuffled if one not in drawn)]

    def _brings_new(self, ids: Tensor) -> bool:
        """Whether enough runs of tokens have not been in a sample yet; if so, they have from now on."""
        runs = run_hashes(ids)
        if not len(runs):  # too short for a run: the whole is compared
            whole = tuple(ids.tolist())
            new = whole not in self._short
            self._short.add(whole)
            return new
        fresh = set(runs.tolist()) - self._seen
        if len(fresh) < _NEW_SHARE * len(runs):
            return False
        self._seen |= fresh
        return True
