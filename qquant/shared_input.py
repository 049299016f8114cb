"""Packed linears that read the same input, computed by one call and handed out one by one.

The first of them to be called computes all; the others are given theirs when they come with the very same input. A
result is handed out once, and nothing is kept when all have theirs. Which linears these are is model_kernels.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from qquant.panels import PanelTensors

Call = Callable[[Tensor], list[Tensor]]
"""x -> one result per width."""

Multiply = Callable[[PanelTensors, list[int], int], Call]
"""(panels, widths, activation bits) -> the call that computes with them, its arguments but ``x`` put together once."""


def _version(x: Tensor) -> int:
    """Changes when ``x`` is written to; tensors of inference mode do not count that."""
    return -1 if x.is_inference() else x._version


class SharedInput:
    """Siblings whose panels lie side by side.

    An input that is changed in place between two siblings is noticed, and they are computed anew, but not in
    ``torch.inference_mode``, where tensors do not count changes: there only a sibling with hooks is taken for one that
    may change it.
    """

    def __init__(self, panels: PanelTensors, panel_counts: list[int], widths: list[int], multiply: Multiply) -> None:
        """Take the panels of all siblings; ``panel_counts`` and ``widths`` say which are whose."""
        self.whole = True
        """Whether all siblings are where, and what, the joint panels are."""
        self._panels, self._counts, self._widths, self._multiply = panels, panel_counts, widths, multiply
        self._slices = self._cut()
        self._behind: set[int] = set()  # siblings that have not yet followed a move
        # Input, its version, activation bits and what waits to be fetched. It is replaced as a whole, and results are
        # taken out of it in one step, so that threads with inputs of their own cannot get each other's.
        self._held: tuple[Tensor, int, int, dict[int, Tensor]] | None = None

    def _cut(self) -> list[PanelTensors]:
        ends = list(accumulate(self._counts))
        return [self._panels.rows(end - count, end) for end, count in zip(ends, self._counts, strict=True)]

    @property
    def panels(self) -> PanelTensors:
        """Those of all siblings, side by side."""
        return self._panels

    def of(self, index: int) -> PanelTensors:
        """The part of one sibling."""
        return self._slices[index]

    def moved(self, index: int, device: torch.device) -> PanelTensors:
        """The part of one sibling on a device; the first of them to ask moves all."""
        if self._panels.words.device != device:
            self._held, self._behind = None, set(range(len(self._counts)))
            self._panels = self._panels.to(device)
            self._slices = self._cut()
        self._behind.discard(index)
        self.whole = not self._behind
        return self._slices[index]

    def break_up(self) -> None:
        """A sibling goes its own way; from now on each computes alone, wherever it goes."""
        self.whole, self._held, self._behind = False, None, {-1}

    def product(
        self, index: int, activation_bits: int, hooks: Mapping[int, object], alone: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The forward of one sibling, for as long as nobody moves.

        Args:
            index: which.
            activation_bits: as ``panel_linear`` takes them.
            hooks: those that run before the sibling's forward and may write to its input.
            alone: computes this sibling only.
        """
        together = self._multiply(self._panels, self._widths, activation_bits)

        def product(x: Tensor) -> Tensor:
            if hooks or not self.whole:
                self._held = None
                return alone(x)
            held = self._held
            if held is not None and held[0] is x and held[1] == _version(x) and held[2] == activation_bits:
                found = held[3].pop(index, None)
                if found is not None:
                    if not held[3]:
                        self._held = None
                    return found
            results = dict(enumerate(together(x)))
            found = results.pop(index)
            self._held = x, _version(x), activation_bits, results
            return found

        return product
