"""Packed linears of every kind the operators take, as tests draw them; and how far a result may be from float64.

What is checked with them is in test_linear_ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qquant import linear_ops

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of a float32 rounded to a dtype once."""

SINGLE = 2.0**-24
"""The same of a real number rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of ``panel_linear``, by sizes and options; tensors are drawn from ``seed``."""

    tokens: int = 3
    columns: int = 256
    widths: tuple[int, ...] = (32,)
    bits: int = 4
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    half_scales: bool = True
    negative_scales: bool = False
    """Of half the groups, as method ``signed`` writes them."""
    with_zeros: bool = False
    with_order: bool = False
    with_bias: bool = False
    activation_bits: int = 0
    seed: int = 0

    @property
    def panels(self) -> int:
        """Panels of 16 rows that the outputs fill."""
        return sum(-(-width // linear_ops.PANEL_ROWS) for width in self.widths)


@dataclass(frozen=True)
class Call:
    """Arguments of ``panel_linear``, in its order."""

    x: Tensor
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    widths: list[int]
    bits: int
    group_size: int
    zero: int
    activation_bits: int

    def arguments(self, **changes: Any) -> tuple[Any, ...]:
        """All of them, some replaced."""
        return tuple({**vars(self), **changes}.values())


def make(case: Case) -> Call:
    """Tensors of a case: activations with a few large columns, as models have them, and any codes."""
    random = torch.Generator().manual_seed(case.seed)
    steps, groups = case.columns * case.bits // 32, -(-case.columns // case.group_size)
    numbers = (case.panels, groups, linear_ops.PANEL_ROWS)
    words = torch.randint(-(2**31), 2**31, (case.panels, steps, linear_ops.PANEL_ROWS), generator=random)
    scales = (torch.rand(numbers, generator=random) + 0.5) * 2.0**-case.bits
    if case.negative_scales:
        scales = scales * (1 - 2 * torch.randint(0, 2, numbers, generator=random))
    levels = 2**case.bits
    order = None
    if case.with_order:
        # A few columns of the panels multiply nothing, and a few of x are not asked for.
        order = torch.randperm(case.columns, generator=random)
        order = torch.where(torch.rand(case.columns, generator=random) < 0.1, -1, order).int()
    x = torch.randn(case.tokens, case.columns, generator=random)
    x = x * torch.where(torch.rand(case.columns, generator=random) < 0.02, 30.0, 1.0)
    return Call(
        x.to(case.dtype),
        words.int(),
        scales.half() if case.half_scales else scales,
        torch.randint(0, levels, numbers, generator=random).to(torch.uint8) if case.with_zeros else None,
        order,
        torch.randn(case.panels * linear_ops.PANEL_ROWS, generator=random) if case.with_bias else None,
        list(case.widths),
        case.bits,
        case.group_size,
        levels // 2,
        case.activation_bits,
    )


def drawn(activation_bits: int) -> st.SearchStrategy[Case]:
    """Cases of one arithmetic: sizes that fill nothing evenly as often as those that do."""

    def sized(bits: int) -> st.SearchStrategy[Case]:
        per = 32 // bits
        columns = st.integers(1, 400 // per).map(lambda steps: steps * per)
        groups = st.one_of(st.sampled_from([8, 32, 64, 128]), st.integers(1, 400 // per).map(lambda steps: steps * per))
        dtypes = [torch.bfloat16] if activation_bits == -1 else list(UNIT)
        return st.builds(
            Case,
            tokens=st.one_of(st.integers(1, 9), st.sampled_from([13, 16, 33, 70])),
            columns=columns,
            widths=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
            bits=st.just(bits),
            group_size=groups,
            dtype=st.sampled_from(dtypes),
            half_scales=st.booleans(),
            negative_scales=st.booleans(),
            with_zeros=st.booleans(),
            with_order=st.booleans(),
            with_bias=st.booleans(),
            activation_bits=st.just(activation_bits),
            seed=st.integers(0, 2**16),
        )

    return st.sampled_from([4, 8]).flatmap(sized)


def blocks_of(columns: int, group_size: int) -> Tensor:
    """Which block each column of the panels lies in: [columns] int64."""
    column = torch.arange(columns)
    per_group = -(-group_size // linear_ops.BLOCK_COLUMNS)
    return column // group_size * per_group + column % group_size // linear_ops.BLOCK_COLUMNS


def exact_weights(call: Call) -> Tensor:
    """The weight in float64, nothing rounded: [P * 16, columns]."""
    codes = linear_ops.codes_of(call.words, call.bits).double()
    group = torch.arange(codes.shape[1]) // call.group_size
    scale = call.scales.double().mT.flatten(0, 1)[:, group]
    zero = call.zero if call.zeros is None else call.zeros.double().mT.flatten(0, 1)[:, group]
    return scale * (codes - zero)


def expected(call: Call, *, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """The product in float64, widths side by side, and how far a kernel may be from it: [..., sum of widths], twice.

    The bound adds up, each as its worst case: activations in fixed point, every float32 rounding, and the result
    rounded to its dtype. docs/panels.md derives the first two. Tiles are held to the weight rounded to bfloat16.

    Args:
        call: what the kernel was given.
        rounded: take the activations as ``linear_ops.rounded_activations`` rounds them, and allow nothing for that.
    """
    weight = exact_weights(call)
    if call.activation_bits == -1:
        weight = weight.float().bfloat16().double()
    values = call.x.reshape(-1, call.x.shape[-1])
    if call.order is not None:
        place = call.order.long()
        values = values[:, place.clamp(min=0)].masked_fill(place < 0, 0.0)
    block = blocks_of(values.shape[1], call.group_size)
    blocks = int(block[-1]) + 1
    if rounded:
        values = linear_ops.rounded_activations(values.float(), call.group_size)
    values = values.double()
    part = torch.zeros_like(values)
    if call.activation_bits != -1 and not rounded:
        bits = call.activation_bits or (24 if call.x.dtype == torch.float32 else 16)
        limit = linear_ops.LIMITS[bits]
        largest = torch.zeros(len(values), blocks, dtype=torch.float64)
        largest.scatter_reduce_(1, block.expand_as(values), values.abs(), "amax")
        # A step is a power of two, up to twice largest / limit, but for 8 bits.
        step = largest / limit * (1.0 if bits == 8 else 2.0)
        # Half a step, and roundings of x / step and largest / limit, each `limit` float32 units at most.
        part = ((0.5 + 2 * limit * SINGLE) * step)[:, block]
    magnitude = (values.abs() + part) @ weight.abs().T
    # Six roundings of a block's sum, step, scale and their products, and one for each block added; tiles and the
    # reference add every column in float32.
    bound = part @ weight.abs().T + (6 + blocks + values.shape[1]) * SINGLE * magnitude
    product = values @ weight.T
    if call.bias is not None:
        product = product + call.bias.double()
        bound = bound + SINGLE * (call.bias.double().abs() + magnitude)
    bound = 1.001 * (bound + UNIT[call.x.dtype] * (product.abs() + bound))  # products of two errors
    if call.x.dtype == torch.float16:
        bound = bound + 2.0**-25  # float16 counts in steps of 2**-24 near zero
    kept, row = [], 0
    for width in call.widths:
        kept.append(torch.arange(row, row + width))
        row += -(-width // linear_ops.PANEL_ROWS) * linear_ops.PANEL_ROWS
    shape = (*call.x.shape[:-1], sum(call.widths))
    rows = torch.cat(kept)
    return product[:, rows].reshape(shape), bound[:, rows].reshape(shape)
