"""The panel form of one packed linear: its sizes, its memory, and the places of its columns.

Panels hold a group's columns as neighbours, in whole words. Where a checkpoint orders them otherwise, or a group does
not fill its last word, ``order`` says which column is at each place. What the operators do with panels is
linear_ops.py's; the checkpoint's own layout is packing.py's.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qquant.errors import BadModelError

ROWS = 16
"""Output features of a panel."""

_LARGE_BYTES = 4 << 20
"""Words that fill at least one page of 2 MB, wherever they begin."""


class PanelForm(NamedTuple):
    """Sizes of a layer's panels, known before any of it is moved."""

    panels: int
    steps: int
    """Words per row."""
    groups: int
    group_size: int
    """Columns of a group in the panels; the last group may be shorter."""
    zero: int | None
    """The zero of all groups, or None: a tensor holds them."""
    scales_dtype: torch.dtype
    bias: bool

    def arguments(
        self, panels: PanelTensors, widths: list[int], bits: int, activation_bits: int
    ) -> tuple[Tensor | list[int] | int | None, ...]:
        """What ``linear_ops.panel_linear`` takes after ``x``.

        Args:
            panels: of this form, or of several layers of it side by side.
            widths: output features of each layer.
            bits: of a code.
            activation_bits: see ``linear_kernels.ACTIVATION_BITS``.
        """
        return *panels, widths, bits, self.group_size, self.zero or 0, activation_bits


class PanelTensors(NamedTuple):
    """The tensors of one layer, or of several side by side, as ``linear_ops.panel_linear`` takes them."""

    words: Tensor
    """[P, S, 16] int32."""
    scales: Tensor
    """[P, G, 16] float16 or float32."""
    zeros: Tensor | None
    """[P, G, 16] uint8, or None: one zero."""
    order: Tensor | None
    """[S * 32 / bits] int32, or None: columns are in their original order."""
    bias: Tensor | None
    """[P * 16] float32, or None."""

    def to(self, device: torch.device) -> PanelTensors:
        """The same on a device."""
        others = (None if part is None else part.to(device) for part in self[2:])
        return PanelTensors(self.words.to(device), self.scales.to(device), *others)

    def rows(self, first: int, last: int) -> PanelTensors:
        """Views of the panels from ``first`` to before ``last``."""
        return PanelTensors(
            self.words[first:last],
            self.scales[first:last],
            None if self.zeros is None else self.zeros[first:last],
            self.order,
            None if self.bias is None else self.bias[first * ROWS : last * ROWS],
        )


class Siblings(Protocol):
    """What a layer must know of those it is computed with; shared_input.py has it."""

    whole: bool
    """Whether one call computes them all."""

    @property
    def panels(self) -> PanelTensors:
        """Those of all of them, side by side."""
        ...

    def of(self, index: int) -> PanelTensors:
        """The panels of one of them."""
        ...

    def moved(self, index: int, device: torch.device) -> PanelTensors:
        """Those on a device, all siblings' having moved."""
        ...

    def break_up(self) -> None:
        """To be told when one of them leaves."""
        ...

    def product(
        self, index: int, activation_bits: int, hooks: Mapping[int, object], alone: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """The forward of one of them."""
        ...


def large_pages(size_bytes: int) -> mmap.mmap | None:
    """Memory of a CPU in pages of 2 MB, where the system gives them, touched only where it is written; None: nowhere.

    What such pages are worth is measured in docs/linear.md.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return None
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a wish: a system without such pages refuses, and nothing changes
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def make_room(form: PanelForm, device: torch.device) -> PanelTensors:
    """Tensors to fill, of memory of their own, without an order."""
    grid, shape = (form.panels, form.groups, ROWS), (form.panels, form.steps, ROWS)
    large = device.type == "cpu" and 4 * prod(shape) >= _LARGE_BYTES
    memory = large_pages(4 * prod(shape)) if large else None
    return PanelTensors(
        torch.empty(shape, dtype=torch.int32, device=device)
        if memory is None
        else torch.frombuffer(memory, dtype=torch.int32).view(shape),
        torch.empty(grid, dtype=form.scales_dtype, device=device),
        torch.empty(grid, dtype=torch.uint8, device=device) if form.zero is None else None,
        None,
        torch.empty(form.panels * ROWS, device=device) if form.bias else None,
    )


def column_order(g_idx: Tensor, *, groups: int, group_size: int, step: int) -> tuple[int, Tensor | None, int]:
    """Where the columns of a layer go.

    Args:
        g_idx: [K] integer, the group of each column. Read, never written.
        groups: how many there are.
        group_size: columns of a group as the checkpoint says.
        step: columns of a word.

    Returns:
        Columns of a group in panels; [columns] int32 order, or None where panels hold them as they are; columns of all.

    Raises:
        BadModelError: a group that is not there.
    """
    columns = g_idx.numel()
    group = g_idx.cpu().long()
    if group_size % step == 0 and torch.equal(group, torch.arange(columns) // group_size):
        return group_size, None, columns
    low, high = (int(end) for end in group.aminmax())
    if low < 0 or high >= groups:
        raise BadModelError(f"g_idx must name groups 0..{groups - 1}, got {low}..{high}")
    counts = group.bincount(minlength=groups)
    # All groups but the last have one size; an empty last one keeps a word, so that it has a scale.
    size = -(-int(counts.max()) // step) * step
    total = (groups - 1) * size + max(1, -(-int(counts[-1]) // step)) * step
    by_group = group.argsort(stable=True)
    rank = torch.arange(columns) - (counts.cumsum(0) - counts)[group[by_group]]
    order = torch.full((total,), -1, dtype=torch.int32)
    order[group[by_group] * size + rank] = by_group.int()
    return size, order.to(g_idx.device), total


def stored_places(order: Tensor, columns: int) -> Tensor:
    """Undo an order: [columns] int32, the place of each column."""
    places = torch.empty(columns, dtype=torch.int32, device=order.device)
    held = order >= 0
    places[order[held].long()] = held.nonzero()[:, 0].int()
    return places
