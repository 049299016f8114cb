"""Slow oracles, written for reading and not for speed; imported by tests only.

Everything is float64 and follows the papers one column, one row, one group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Grid:
    """Scale and zero of one group, one entry per row."""

    scale: Tensor
    zero: Tensor


def fit_row(values: list[float], bits: int, sym: bool, shrink: float, signed: bool = False) -> tuple[float, float]:
    """The min-max grid of one row's group, with a float16 scale and a zero that v1 files can store."""
    levels = 2**bits - 1
    low, high = min(0.0, *values) * shrink, max(0.0, *values) * shrink

    def storable(scale: float) -> float:
        return max(float(torch.tensor(scale, dtype=torch.float64).half()), 2.0**-24)

    if sym and signed:
        # The value that lies farthest from 0 gets code 0, which is 2^(bits - 1) steps away from the zero.
        step = storable(max(high, -low) / 2 ** (bits - 1))
        return (-step if high > -low else step), float(2 ** (bits - 1))
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


def fit_group(
    weights: Tensor, bits: int, sym: bool, clip_search: str, block: Tensor, inverse: Tensor, signed: bool = False
) -> Grid:
    """The grid of one group for every row: [rows, size] -> Grid.

    ``block`` [size, size] is the group's part of the Hessian, ``inverse`` that of the inverse as it is by now.
    """
    scales, zeros = [], []
    for row in weights:
        values = row.tolist()
        shrinks = [1.0] if clip_search == "off" else [1.0 - 0.025 * step for step in range(21)]
        if clip_search == "loop":
            shrinks = [1.0 - 0.05 * step for step in range(7)]
        best = None
        for shrink in shrinks:
            scale, zero = fit_row(values, bits, sym, shrink, signed)
            if clip_search == "loop":
                loss = loop_loss(row, scale, zero, bits, inverse)
            else:
                codes = round_row(values, scale, zero, bits)
                error = torch.tensor([scale * (c - zero) - v for c, v in zip(codes, values, strict=True)]).double()
                loss = float(error @ (block if clip_search == "hessian" else torch.eye(len(values)).double()) @ error)
            if best is None or loss < best[0]:
                best = (loss, scale, zero)
        assert best is not None
        scales.append(best[1])
        zeros.append(best[2])
    return Grid(torch.tensor(scales).double(), torch.tensor(zeros).double())


def loop_loss(row: Tensor, scale: float, zero: float, bits: int, inverse: Tensor) -> float:
    """What the paper's loop loses in one row of a group on this grid: the sum of (w - w_hat)^2 / Hinv_qq."""
    left, eliminated, loss = row.clone(), inverse.clone(), 0.0
    for q in range(len(row)):
        (code,) = round_row([float(left[q])], scale, zero, bits)
        error = float(left[q]) - scale * (code - zero)
        loss += error**2 / float(eliminated[q, q])
        left[q + 1 :] -= error / eliminated[q, q] * eliminated[q, q + 1 :]
        eliminated = eliminated - eliminated[:, q : q + 1] @ eliminated[q : q + 1] / eliminated[q, q]
    return loss


def pivot_ranks(hessian: Tensor) -> list[int]:
    """The step at which each column is visited: from the back, what has the smallest pivot of what is left."""
    columns = hessian.shape[0]
    left = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns).double()
    remaining, ranks = list(range(columns)), [0] * columns
    for step in reversed(range(columns)):
        chosen = min(remaining, key=lambda c: float(left[c, c]))
        ranks[chosen] = step
        remaining.remove(chosen)
        left = left - left[:, chosen : chosen + 1] @ left[chosen : chosen + 1] / left[chosen, chosen]
    return ranks


def visiting_order(hessian: Tensor, size: int, desc_act: bool, group_aware: bool, pivot: bool = False) -> list[int]:
    """Columns in the order in which they are quantized."""
    diagonal = hessian.diagonal().tolist()
    columns = list(range(len(diagonal)))
    if desc_act:
        return sorted(columns, key=lambda c: -diagonal[c])
    groups = [columns[i : i + size] for i in range(0, len(columns), size)]
    if group_aware:
        groups.sort(key=lambda group: -max(diagonal[c] for c in group))
        return [c for group in groups for c in sorted(group, key=lambda c: -diagonal[c])]
    if pivot:
        ranks = pivot_ranks(hessian)
        groups.sort(key=lambda group: sum(ranks[c] for c in group))
        return [c for group in groups for c in sorted(group, key=lambda c: ranks[c])]
    return columns


@dataclass
class Slow:
    """What the slow loop chose, in original column order."""

    codes: Tensor
    """[out, in] int64."""
    values: Tensor
    """[out, in] float64."""
    grids: dict[int, Grid]
    group_of: list[int]
    """The group of each column."""


def gptq_one_column_at_a_time(weight: Tensor, hessian: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int64 and the weights they stand for [out, in] float64 of ``gptq_slowly``."""
    found = gptq_slowly(weight, hessian, **options)
    return found.codes, found.values


def gptq_slowly(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    size: int,
    sym: bool,
    desc_act: bool = False,
    static_groups: bool = False,
    group_aware: bool = False,
    pivot: bool = False,
    clip_search: str = "off",
    signed: bool = False,
    damp_percent: float = 0.01,
    mismatch: Tensor | None = None,
    strength: float = 1.0,
    outputs: Tensor | None = None,
) -> Slow:
    """GPTQ with the inverse Hessian itself: no blocks, no Cholesky, no trailing panels.

    After column q the remaining weights move by -(w_q - w_hat_q) / Hinv_qq * Hinv_q: and the row and column of q are
    eliminated from Hinv: the paper's equations 2 and 3, with which the Cholesky form must agree.

    With ``mismatch`` E[(x_original - x) x^T] it is GPTAQ: the columns that are left also take over what the original's
    input of column q has beyond the input that comes: w_q E[(x_original - x)_q x^T] times the inverse of their Hessian.

    With ``outputs`` [blocks, side, side], damped, rows make up for one another while a column is rounded.
    """
    work, plain = weight.double().clone(), weight.double()
    h = damped_hessian(hessian, damp_percent)
    columns = h.shape[0]
    inverse = torch.linalg.inv(h)
    raw = hessian.double()
    order = visiting_order(raw, size, desc_act, group_aware, pivot)
    regrouped = desc_act and not static_groups
    codes = torch.zeros_like(weight, dtype=torch.int64)
    values = torch.zeros_like(work)
    grids: dict[int, Grid] = {}
    group_of = [0] * columns
    for position, column in enumerate(order):
        group = group_of[column] = position // size if regrouped else column // size
        if group not in grids:
            members = order[position : position + size]
            source = work
            if static_groups:
                members, source = list(range(group * size, (group + 1) * size)), plain
            square = (raw[members][:, members], inverse[members][:, members])
            grids[group] = fit_group(source[:, members], bits, sym, clip_search, *square, signed)
        grid = grids[group]
        meant = work[:, column].clone()
        for row, others in row_turns(meant, outputs):
            scale, zero = float(grid.scale[row]), float(grid.zero[row])
            (code,) = round_row([float(meant[row])], scale, zero, bits)
            codes[row, column] = int(code)
            values[row, column] = scale * (code - zero)
            meant -= (meant[row] - values[row, column]) * others
        error = (work[:, column] - values[:, column]) / inverse[column, column]
        left = torch.tensor(order[position + 1 :], dtype=torch.long)
        work[:, left] -= error[:, None] * inverse[column, left][None, :]
        if mismatch is not None and len(left):
            taken = mismatch[column, left] @ torch.linalg.inv(h[left][:, left])
            work[:, left] += strength * work[:, column : column + 1] * taken[None, :]
        inverse = inverse - inverse[:, column : column + 1] @ inverse[column : column + 1, :] / inverse[column, column]
    return Slow(codes, values, grids, group_of)


def row_turns(column: Tensor, outputs: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The rows in the order in which they are rounded, and how far each row [out] moves back per unit of its error.

    Without ``outputs`` from top to bottom, and none moves. With them it is the paper's loop along the other axis: in
    every block by falling diagonal, each row's part of what is left of the block's inverse.
    """
    rows = column.shape[0]
    side = rows if outputs is None else outputs.shape[1]
    for number in range(rows // side):
        block = torch.eye(side).double() if outputs is None else outputs[number].double()
        inverse = torch.linalg.inv(block)
        waiting = sorted(range(side), key=lambda row: -float(block[row, row]))
        while waiting:
            row = waiting.pop(0)
            others = torch.zeros_like(column)
            for other in waiting:
                others[number * side + other] = inverse[row, other] / inverse[row, row]
            yield number * side + row, others
            inverse = inverse - inverse[:, row : row + 1] @ inverse[row : row + 1] / inverse[row, row]


def damped_hessian(hessian: Tensor, damp_percent: float) -> Tensor:
    """The Hessian that is inverted: columns without input get the mean diagonal of the others, then all get damping."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not bool(dead.all()) else torch.ones(()).double()
    h[dead, dead] = mean
    h += damp_percent * mean * torch.eye(h.shape[0]).double()
    return h
