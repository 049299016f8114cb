"""The order in which GPTQ visits columns, and the triangular factor of the Hessian's inverse in that order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qquant.errors import NumericError
from qquant.finite import all_finite
from qquant.methods import Order

_PANEL = 256  # rows that are gathered at a time
_LEAF = 256  # side of the triangles that are inverted by substitution
_CORNER = 128  # side of what is factorized at once
MOST_RAISES = 3
"""Damping is raised tenfold at most this often."""

_TRUSTED = 0.5  # share of the damping below which a pivot is rounding, or tells of an indefinite matrix
_PIVOT_DAMP = 0.01  # share of the mean diagonal under which pivots are not told apart


def column_order(
    hessian: Tensor, size: int, order: Order, *, desc_act: bool = False, static_groups: bool = False
) -> tuple[Tensor, Tensor]:
    """In which order columns are visited, and to which group each belongs.

    Args:
        hessian: [in, in]; all orders but "pivot" read its diagonal only.
        size: columns per group.
        order: "left-to-right", "group-aware" or "pivot".
        desc_act: columns by falling diagonal instead, grouped in that order unless ``static_groups``.
        static_groups: groups are the stored ones whatever the order.

    Returns:
        order: [in] int64, order[p] = the column visited at step p.
        group_of: [in] int64, group_of[p] = its group.

    Sources: act-order, AutoGPTQ's ``desc_act``; static groups, AutoGPTQ's ``static_groups``; group-aware order,
        GPTQModel's ``act_group_aware``; smallest pivot last, arXiv:2507.18553.
    """
    diagonal = hessian.diagonal()
    columns = diagonal.numel()
    position = torch.arange(columns, device=diagonal.device)
    if desc_act:
        found = torch.argsort(diagonal, descending=True, stable=True)
        return found, (found if static_groups else position) // size
    if order == "group-aware":
        grouped = diagonal.reshape(-1, size)
        inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
        groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
    elif order == "pivot":
        rank = torch.empty_like(position)
        rank[smallest_pivot_last(hessian)] = position
        grouped = rank.reshape(-1, size)
        inside = torch.argsort(grouped, dim=1, stable=True)
        groups = torch.argsort(grouped.double().mean(1), stable=True)
    else:
        return position, position // size
    found = (groups[:, None] * size + inside[groups]).reshape(-1)
    return found, found // size


def smallest_pivot_last(hessian: Tensor) -> Tensor:
    """Columns ordered from the back: the one with the smallest pivot of what is left is put last and eliminated.

    GPTQ leaves the square of the rounding error times the pivots; this order keeps their largest small.

    Args:
        hessian: [in, in], read, never written; a hundredth of its mean diagonal is added, columns without input left
            out of the mean: these come last, and how many there are changes nothing for the others.

    Returns:
        [in] int64.

    Source: the min-pivot order of arXiv:2507.18553, by a Cholesky factorization that computes one column a step.
    """
    columns = hessian.shape[0]
    left = hessian.diagonal().double()
    damp = _PIVOT_DAMP * left.sum() / max(1, int((left != 0).sum()))
    left = left + damp
    rows = torch.zeros(columns, columns, dtype=torch.float64, device=hessian.device)
    order = torch.empty(columns, dtype=torch.int64, device=hessian.device)
    gone = torch.zeros(columns, dtype=torch.bool, device=hessian.device)
    for step in range(columns):
        chosen = int(left.masked_fill(gone, torch.inf).argmin())
        order[columns - 1 - step] = chosen
        gone[chosen] = True
        row = hessian[chosen].to(torch.float64, copy=True)
        row[chosen] += damp
        row -= rows[:step, chosen] @ rows[:step]
        row /= left[chosen].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        rows[step] = row
        left -= row * row
    return order


def inverse_factor(
    hessian: Tensor, order: Tensor, dead: Tensor, damp_percent: float, *, raises: int = MOST_RAISES
) -> tuple[Tensor, float, int]:
    """The triangular factor of the damped Hessian's inverse, in reversed visiting order.

    GPTQ needs the upper-triangular U with H^-1 = U^T U, H in visiting order. With J the reversal of an order,
    J H J = L L^T by one Cholesky factorization, and U = J L^-1 J. What is returned is L^-1, in the memory of the
    factorization; ``factor_rows`` reads U out of it. Damping is raised tenfold while there is no factor that can be
    trusted: the factorization fails, or a number in it is not finite, or a pivot is below half the damping, where no
    positive semidefinite matrix has pivots below all of it.

    Args:
        hessian: [in, in], read, never written.
        order: [in] visiting order.
        dead: [in] bool, columns without input; they get the mean of the others on the diagonal and influence nothing.
        damp_percent: share of the mean diagonal that is added to it.
        raises: how often at most that is raised.

    Returns:
        L^-1 [in, in] lower triangular, the damping that was used, and how often it was raised.

    Raises:
        NumericError: no factor at the largest damping.
    """
    backwards = order.flip(0)
    live = hessian.diagonal()[~dead]
    mean = live.mean() if live.numel() else hessian.new_ones(())
    diagonal = torch.where(dead, mean, hessian.diagonal())
    for escalation in range(raises + 1):
        damp = damp_percent * 10**escalation
        lower = torch.empty_like(hessian)
        for start in range(0, lower.shape[0], _PANEL):
            rows = hessian.index_select(0, backwards[start : start + _PANEL])
            torch.index_select(rows, 1, backwards, out=lower[start : start + _PANEL])
        lower.diagonal().copy_((diagonal + damp * mean)[backwards])
        with _one_thread():
            if _factorize(lower) and bool((lower.diagonal().square() >= _TRUSTED * damp * mean).all()):
                _invert_lower(lower)
                if all_finite(lower) and all_finite(lower.diagonal().reciprocal()):
                    return lower, damp, escalation
    raise NumericError(
        f"a Hessian must become positive definite by damping, but failed up to damp_percent {damp:g}; "
        "give more or more varied calibration data, or leave this module out"
    )


def factor_rows(inverse: Tensor, start: int, end: int) -> Tensor:
    """Rows ``start`` to ``end`` of U from column ``start`` on, [end - start, in - start], from L^-1."""
    columns = inverse.shape[0]
    return inverse[columns - end : columns - start, : columns - start].flip(0, 1)


def times_inverse(matrix: Tensor, inverse: Tensor, order: Tensor) -> Tensor:
    """``matrix`` [rows, in] times the inverse of the damped Hessian, from ``inverse_factor`` and its ``order``.

    With J H J = L L^T in visiting order it is J L^-T L^-1 J: two products with the triangle that is there already.
    """
    backwards = order.flip(0)
    product = matrix[:, backwards] @ inverse.T @ inverse
    found = torch.empty_like(matrix)
    found[:, backwards] = product
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Triangular solves, and products of odd sides, round otherwise with another number of threads: they get one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factorize(matrix: Tensor) -> bool:
    """Replace a matrix by its lower Cholesky factor; False, and no sound content, if it is not positive definite."""
    size = matrix.shape[0]
    for start in range(0, size, _CORNER):
        end = min(start + _CORNER, size)
        corner, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if int(info) or not bool(torch.isfinite(corner.diagonal()).all()):
            return False
        matrix[start:end, start:end] = corner
        below = matrix[end:, start:end]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
        for first in range(end, size, _PANEL):  # only blocks on and below the diagonal
            panel = matrix[first : first + _PANEL, start:end]
            matrix[first:, first : first + _PANEL].addmm_(matrix[first:, start:end], panel.T, alpha=-1)
    matrix.tril_()
    return True


def _invert_lower(matrix: Tensor) -> None:
    """Invert a lower-triangular matrix in place, by halves: [[A, 0], [B, C]] -> [[A', 0], [-C' B A', C']]."""
    size = matrix.shape[0]
    if size <= _LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = size // 2
    _invert_lower(matrix[:half, :half])
    _invert_lower(matrix[half:, half:])
    torch.mm(matrix[half:, half:], -(matrix[half:, :half] @ matrix[:half, :half]), out=matrix[half:, :half])
