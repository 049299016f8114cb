"""Which option each stage of a model takes: the least cost within a number of bytes, or the fewest bytes within a cost.

Plain arithmetic on bytes and costs. What an option is, what it costs and what the rest of a file takes is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_UNITS = 1 << 17
"""Sizes that are told apart. A small model has fewer, and a choice for it is exact. Of a 7B model's sizes, some half
million, each stage's is rounded up by half a unit on average, which leaves a thousandth of the range unused."""


@dataclass(frozen=True)
class Option:
    """One way to store a stage."""

    size_bytes: int
    cost: float
    """What it adds to the total; not negative."""


@dataclass(frozen=True)
class Allocation:
    """One option for every stage."""

    chosen: tuple[int, ...]
    """Per stage the place of its option."""
    size_bytes: int
    """Of all chosen options together."""
    cost: float
    """Of all chosen options together."""


class Allocator:
    """Knows the least cost at every size that the stages can take together.

    The costs of stages add up, so the best choice is a knapsack problem with one option per stage, solved by dynamic
    programming over sizes in units of the sizes' greatest common divisor. Where that divisor is too small to list
    all sizes, each option's size is rounded up to a coarser unit: what is chosen then still fits.

    Args:
        stages: the options of each stage, at least one each.
    """

    def __init__(self, stages: Sequence[Sequence[Option]]) -> None:
        """Fill the table: stages times options passes over the sizes."""
        self.stages = [tuple(options) for options in stages]
        assert self.stages, "there must be a stage"
        assert all(self.stages), "each stage must have an option"
        self._least = [min(option.size_bytes for option in options) for options in self.stages]
        steps = [
            option.size_bytes - low for options, low in zip(self.stages, self._least, strict=True) for option in options
        ]
        reach = sum(
            max(option.size_bytes for option in options) - low
            for options, low in zip(self.stages, self._least, strict=True)
        )
        self._unit = max(math.gcd(*steps), -(-reach // _MOST_UNITS), 1)
        self._units = [
            [-(-(option.size_bytes - low) // self._unit) for option in options]
            for options, low in zip(self.stages, self._least, strict=True)
        ]
        self._costs, self._taken = self._fill()

    @property
    def least_bytes(self) -> int:
        """The smallest size."""
        return sum(self._least)

    @property
    def most_bytes(self) -> int:
        """The largest size."""
        return sum(max(option.size_bytes for option in options) for options in self.stages)

    def within_bytes(self, limit_bytes: int, *, wanted_bytes: int = 0) -> Allocation | None:
        """The least cost at a size of at most ``limit_bytes``.

        Args:
            limit_bytes: the most that all options may take together.
            wanted_bytes: smaller sizes are taken only if there is none from here up to the limit.

        Returns:
            The choice, or None if even the smallest options take more.
        """
        room = (limit_bytes - self.least_bytes) // self._unit
        if room < 0:
            return None
        fitting = self._costs[: room + 1]
        start = max(0, -(-(wanted_bytes - self.least_bytes) // self._unit))
        window = fitting[min(start, room + 1) :]
        if window.numel() and bool(torch.isfinite(window).any()):
            return self._read(start + int(window.argmin()))
        finite = torch.isfinite(fitting).nonzero()[:, 0]
        return self._read(int(finite[fitting[finite].argmin()]))

    def within_cost(self, limit: float) -> Allocation | None:
        """The smallest size that costs at most ``limit``, or None if there is none."""
        fitting = (self._costs <= limit).nonzero()[:, 0]
        return self._read(int(fitting[0])) if fitting.numel() else None

    def frontier(self, count: int) -> list[Allocation]:
        """Choices than which none is both smaller and cheaper, from the smallest to the cheapest.

        Args:
            count: how many at most, spread evenly over the sizes.
        """
        best = torch.cummin(self._costs, 0).values
        ends = torch.cat([best.new_tensor([math.inf]), best[:-1]])
        places = (best < ends).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1])
        wanted = [first + (last - first) * step / max(1, count - 1) for step in range(count)]
        # The largest place that is not beyond each wanted size.
        picked = {int(places[int((places <= size + 1e-9).sum()) - 1]) for size in wanted}
        return [self._read(place) for place in sorted(picked)]

    def _fill(self) -> tuple[Tensor, list[Tensor]]:
        """Least cost at exactly each size [units] float64, infinite where there is none; per stage what was taken."""
        total = sum(max(units) for units in self._units)
        costs = torch.full((total + 1,), math.inf, dtype=torch.float64)
        costs[0] = 0.0
        taken: list[Tensor] = []
        for options, units in zip(self.stages, self._units, strict=True):
            best = torch.full_like(costs, math.inf)
            which = torch.zeros(total + 1, dtype=torch.uint8)
            for place, (option, step) in enumerate(zip(options, units, strict=True)):
                with_it = torch.full_like(costs, math.inf)
                with_it[step:] = costs[: total + 1 - step] + option.cost
                better = with_it < best
                best = torch.where(better, with_it, best)
                which[better] = place
            costs = best
            taken.append(which)
        return costs, taken

    def _read(self, place: int) -> Allocation:
        """The options behind one size of the table."""
        chosen: list[int] = []
        for which, units in zip(reversed(self._taken), reversed(self._units), strict=True):
            option = int(which[place])
            chosen.append(option)
            place -= units[option]
        chosen.reverse()
        picked = [options[place] for options, place in zip(self.stages, chosen, strict=True)]
        return Allocation(
            tuple(chosen), sum(option.size_bytes for option in picked), math.fsum(option.cost for option in picked)
        )
