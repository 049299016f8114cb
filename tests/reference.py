"""Slow oracles, written for reading and not for speed; imported by tests only.

Everything is float64 and follows the papers one column, one row, one group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Grid:
    """Scale and zero of one group, one entry per row."""

    scale: Tensor
    zero: Tensor


def fit_row(values: list[float], bits: int, sym: bool, shrink: float) -> tuple[float, float]:
    """The min-max grid of one row's group, with a float16 scale and a zero that v1 files can store."""
    levels = 2**bits - 1
    low, high = min(0.0, *values) * shrink, max(0.0, *values) * shrink

    def storable(scale: float) -> float:
        return max(float(torch.tensor(scale, dtype=torch.float64).half()), 2.0**-24)

    if sym:
        return storable(2 * max(high, -low) / levels), float(2 ** (bits - 1))
    scale = storable((high - low) / levels)
    zero = min(float(round(-low / scale)), float(levels))
    if zero < 1:
        return storable(high / (levels - 1)), 1.0
    return scale, zero


def round_row(values: list[float], scale: float, zero: float, bits: int) -> list[float]:
    """Codes of one row's group; Python rounds halves to even, as torch does."""
    return [min(max(round(v / scale) + zero, 0), 2**bits - 1) for v in values]


def fit_group(weights: Tensor, bits: int, sym: bool, clip_search: str, block: Tensor) -> Grid:
    """The grid of one group for every row: [rows, size] -> Grid."""
    scales, zeros = [], []
    for row in weights:
        values = row.tolist()
        shrinks = [1.0] if clip_search == "off" else [1.0 - 0.025 * step for step in range(21)]
        best = None
        for shrink in shrinks:
            scale, zero = fit_row(values, bits, sym, shrink)
            codes = round_row(values, scale, zero, bits)
            error = torch.tensor([scale * (c - zero) - v for c, v in zip(codes, values, strict=True)]).double()
            loss = float(error @ (block if clip_search == "hessian" else torch.eye(len(values)).double()) @ error)
            if best is None or loss < best[0]:
                best = (loss, scale, zero)
        assert best is not None
        scales.append(best[1])
        zeros.append(best[2])
    return Grid(torch.tensor(scales).double(), torch.tensor(zeros).double())


def visiting_order(diagonal: list[float], size: int, desc_act: bool, group_aware: bool) -> list[int]:
    """Columns in the order in which they are quantized."""
    columns = list(range(len(diagonal)))
    if desc_act:
        return sorted(columns, key=lambda c: -diagonal[c])
    if group_aware:
        groups = [columns[i : i + size] for i in range(0, len(columns), size)]
        groups.sort(key=lambda group: -max(diagonal[c] for c in group))
        return [c for group in groups for c in sorted(group, key=lambda c: -diagonal[c])]
    return columns


def gptq_one_column_at_a_time(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    size: int,
    sym: bool,
    desc_act: bool = False,
    static_groups: bool = False,
    group_aware: bool = False,
    clip_search: str = "off",
    damp_percent: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """GPTQ with the inverse Hessian itself: no blocks, no Cholesky, no trailing panels.

    After column q the remaining weights move by -(w_q - w_hat_q) / Hinv_qq * Hinv_q: and the row and column of q are
    eliminated from Hinv: the paper's equations 2 and 3, with which the Cholesky form must agree.

    Returns codes [out, in] int64 and the weights they stand for [out, in] float64, both in original column order.
    """
    work, plain = weight.double().clone(), weight.double()
    h = hessian.double().clone()
    columns = h.shape[0]
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not bool(dead.all()) else torch.ones(()).double()
    h[dead, dead] = mean
    h += damp_percent * mean * torch.eye(columns).double()
    inverse = torch.linalg.inv(h)
    order = visiting_order(hessian.double().diagonal().tolist(), size, desc_act, group_aware)
    regrouped = desc_act and not static_groups
    raw = hessian.double()
    codes = torch.zeros_like(weight, dtype=torch.int64)
    values = torch.zeros_like(work)
    grids: dict[int, Grid] = {}
    for position, column in enumerate(order):
        group = position // size if regrouped else column // size
        if group not in grids:
            members = order[position : position + size]
            source = work
            if static_groups:
                members, source = list(range(group * size, (group + 1) * size)), plain
            grids[group] = fit_group(source[:, members], bits, sym, clip_search, raw[members][:, members])
        grid = grids[group]
        for row in range(weight.shape[0]):
            scale, zero = float(grid.scale[row]), float(grid.zero[row])
            (code,) = round_row([float(work[row, column])], scale, zero, bits)
            codes[row, column] = int(code)
            values[row, column] = scale * (code - zero)
        error = (work[:, column] - values[:, column]) / inverse[column, column]
        left = torch.tensor(order[position + 1 :], dtype=torch.long)
        work[:, left] -= error[:, None] * inverse[column, left][None, :]
        inverse = inverse - inverse[:, column : column + 1] @ inverse[column : column + 1, :] / inverse[column, column]
    return codes, values
