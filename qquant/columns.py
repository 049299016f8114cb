"""What of a solution depends on a linear's columns alone: their order, their factor, and what is done without a factor.

The ladder: damping as asked, damping raised (factor.py), columns left out whose entries no inputs can have, and last
no factor at all, on which the solver rounds to nearest. Each step down is told in ``Prepared.fallback``; numbers that
are no moments of anything are refused. What is done with the rows is solver.py's.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qquant.config import QuantizeConfig
from qquant.errors import NumericError, UsageError
from qquant.factor import MOST_RAISES, column_order, factor_rows, inverse_factor
from qquant.finite import all_finite
from qquant.moments import Moments

_RANGE = (2.0**-100, 2.0**60)
"""Mean squares of inputs between which products with weights that float16 scales can hold stay inside float32."""

_SLACK = 1.1
"""By which factor products must exceed their bound before rounding cannot be the reason: float32 sums over a million
tokens are off by 0.06 at worst."""

_PANEL = 256  # rows that are compared at a time


@dataclass(frozen=True)
class Prepared:
    """Made once by ``prepare``, used for any rows that share these columns."""

    order: Tensor
    """[in] int64 visiting order."""
    group_of: Tensor
    """[in] int64, group of the column visited at each step."""
    dead: Tensor
    """[in] bool, columns without input, and those left out."""
    inverse: Tensor | None
    """[in, in] from ``inverse_factor``, in ``order``; None: there is no factor, and rows are rounded to nearest."""
    damp_percent: float
    escalations: int
    feedback: Tensor | None = None
    """[in, in] from ``mismatch_feedback``, of gptaq."""
    left_out: Tensor | None = None
    """[in] bool, columns whose moments are not used because no inputs can have them."""
    fallback: str | None = None
    """What was done instead of what was asked, and why; None: all as asked."""


def prepare(moments: Moments | Tensor, config: QuantizeConfig) -> Prepared:
    """Order and factor the columns that ``moments`` are of; reads their ``inputs`` and ``mismatch``, never writes them.

    Raises:
        UsageError: group_size does not divide the row length, or gptaq or qep has no mismatch.
        NumericError: a moment that is not finite, or a Hessian whose diagonal is so far below 0 that damping does not
            reach it; with ``config.strict`` also whatever would be a fallback.
    """
    known = Moments(moments) if isinstance(moments, Tensor) else moments
    size = group_columns(known.inputs.shape[0], config.group_size)
    if config.recipe.base in ("gptaq", "qep") and known.mismatch is None:
        raise UsageError(f"{config.recipe.base} needs the mismatch of a linear's inputs to the original's; see Moments")
    _refuse_what_is_no_moment(known, config.damp_percent)
    found = _highest_rung(known, config, size)
    if config.strict and found.fallback is not None:
        raise NumericError(
            f"--strict forbids fallbacks, and this needs one ({found.fallback}); give more or more varied calibration "
            "data, or a larger --damp-percent, leave the module alone with --skip, or leave --strict out"
        )
    return found


def usable(moments: Moments, prepared: Prepared) -> Moments:
    """The moments without those of the columns that were left out; the same object where none was."""
    return moments if prepared.left_out is None else _without(moments, prepared.left_out)


def group_columns(columns: int, group_size: int) -> int:
    """Columns per group; raises UsageError that lists the divisors if ``group_size`` does not divide the row."""
    size = columns if group_size == -1 else group_size
    if columns % size:
        divisors = [d for d in range(8, columns + 1) if columns % d == 0]
        raise UsageError(
            f"group_size must divide the row length: {group_size} does not divide {columns}; "
            f"usable: -1 (whole row) or one of {divisors}"
        )
    return size


def mismatch_feedback(mismatch: Tensor | None, inverse: Tensor, order: Tensor, strength: float) -> Tensor | None:
    """GPTAQ's second feedback: P[q, k] is how far weight k moves per unit of weight q, for k behind q in the order.

    Row q is E[(x_original - x)_q x_k^T] times the inverse of the Hessian of the columns behind q; with the factor U of
    all columns that is strictly_upper(M U^T) U.

    Args:
        mismatch: [in, in], E[(x_original - x) x^T], in original places.
        inverse: from ``inverse_factor``, in ``order``.
        order: [in] visiting order.
        strength: factor on it.

    Returns:
        [in, in] in visiting order, strictly upper triangular.

    Source: Li et al., GPTAQ, arXiv:2504.02692.
    """
    assert mismatch is not None
    factor = factor_rows(inverse, 0, inverse.shape[0])
    return ((mismatch[order][:, order] @ factor.T).triu(1) @ factor).mul_(strength)


def impossible_columns(hessian: Tensor) -> Tensor:
    """Columns to leave out so that what is left could be second moments, [in] bool: greedily, the worst first.

    No inputs have a mean square below 0, nor |E[x_i x_j]| above sqrt(E[x_i^2] E[x_j^2]). That finds damaged entries,
    rows and columns; a Hessian can be indefinite without any.
    """
    diagonal = hessian.diagonal()
    found = diagonal < 0
    # Squares of tiny inputs underflow where their products with other inputs do not.
    bound = (_SLACK * diagonal.clamp(min=torch.finfo(hessian.dtype).tiny)).sqrt()
    bound[found] = torch.inf
    panels = zip(hessian.split(_PANEL), bound.split(_PANEL), strict=True)
    counts = torch.cat([(rows.abs() > limits[:, None] * bound).sum(1) for rows, limits in panels])
    while int(counts.max()) > 0:
        worst = int(counts.argmax())
        counts -= (hessian[worst].abs() > bound[worst] * bound).long()
        found[worst] = True
        counts[found] = 0
    return found


def _refuse_what_is_no_moment(known: Moments, damp_percent: float) -> None:
    """Not finite, or a mean square so far below 0 that the largest damping would not reach it: the sums are damaged."""
    if not all_finite(known.inputs):
        raise NumericError("a Hessian must be finite, got NaN or Inf: the inputs overflow, or the sums are damaged")
    if known.mismatch is not None and not all_finite(known.mismatch):
        raise NumericError("the mismatch of a linear's inputs to the original's must be finite, got NaN or Inf")
    diagonal = known.inputs.diagonal().double()
    least, mean = float(diagonal.min()), float(diagonal.mean())
    if least < -damp_percent * 10**MOST_RAISES * max(mean, 0.0):
        raise NumericError(
            f"a Hessian must be positive definite up to rounding, got {least:.3g} on its diagonal, where mean squares "
            f"stand ({mean:.3g} on average): the sums are damaged, calibrate again"
        )


def _highest_rung(known: Moments, config: QuantizeConfig, size: int) -> Prepared:
    """The first step of the ladder that gives a factor, or the last, which needs none."""
    hessian = known.inputs
    why = _unusable(hessian)
    if why is None:
        try:
            return _factored(known, config, size)
        except NumericError as error:
            why = str(error).partition(";")[0]
    left_out = impossible_columns(hessian)
    if bool(left_out.any()):
        rest = _without(known, left_out)
        if _unusable(rest.inputs) is None:
            with suppress(NumericError):
                found = _factored(rest, config, size)
                said = f"{int(left_out.sum())} of {left_out.numel()} input columns rounded to nearest: {why}"
                said = said if found.fallback is None else f"{said}; {found.fallback}"
                return replace(found, left_out=left_out, fallback=said)
    dead = hessian.diagonal() == 0
    places = torch.arange(dead.numel(), device=dead.device)
    said = f"rounded to nearest: {why}"
    return Prepared(places, places // size, dead, None, config.damp_percent, 0, fallback=said)


def _unusable(hessian: Tensor) -> str | None:
    """Why there is no use in factorizing a Hessian, if there is none."""
    diagonal = hessian.diagonal()
    live, most = diagonal[diagonal != 0].double(), float(diagonal.max())
    mean = float(live.mean()) if live.numel() else 1.0
    if mean < _RANGE[0] or most > _RANGE[1]:
        return f"its inputs' mean squares, {mean:.3g} on average and at most {most:.3g}, are outside 2^-100 .. 2^60"
    # Squares of tiny inputs underflow where their products with other inputs do not.
    limit = _SLACK * math.sqrt(torch.finfo(hessian.dtype).tiny * max(most, 0.0))
    for rows in (diagonal == 0).nonzero()[:, 0].split(_PANEL):
        if rows.numel() and float(hessian[rows].abs().max()) > limit:
            return "no inputs give the entries of its Hessian: products where squares are 0"
    return None


def _factored(known: Moments, config: QuantizeConfig, size: int) -> Prepared:
    """By damping alone. Raises NumericError if no damping helps."""
    hessian, recipe = known.inputs, config.recipe
    dead = hessian.diagonal() == 0
    order, group_of = column_order(
        hessian, size, config.order, desc_act=config.desc_act, static_groups=config.static_groups
    )
    inverse, damp_percent, escalations = inverse_factor(hessian, order, dead, config.damp_percent)
    feedback = mismatch_feedback(known.mismatch, inverse, order, recipe.strength) if recipe.base == "gptaq" else None
    said = f"damping raised from {config.damp_percent:g} to {damp_percent:g}" if escalations else None
    return Prepared(order, group_of, dead, inverse, damp_percent, escalations, feedback, fallback=said)


def _without(known: Moments, columns: Tensor) -> Moments:
    """A copy in which these columns have no input."""

    def cut(moment: Tensor | None, *, rows: bool) -> Tensor | None:
        if moment is None:
            return None
        moment = moment.clone()
        moment[:, columns] = 0
        if rows:
            moment[columns] = 0
        return moment

    inputs = cut(known.inputs, rows=True)
    assert inputs is not None
    return replace(
        known, inputs=inputs, mismatch=cut(known.mismatch, rows=True), residual=cut(known.residual, rows=False)
    )
