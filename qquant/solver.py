"""GPTQ mathematics: the codes of one weight matrix by what calibration found out. No model, no files, no hooks.

Every method goes through ``solve``: it takes the weight, its moments and the config, and returns a ``Solution``.
Moments are moments.py's, what depends on columns alone, and the ladder of fallbacks, columns.py's, grids affine.py's,
the second look at codes refinement.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qquant.affine import dequantize, quantize, search_qparams
from qquant.columns import Prepared, group_columns, prepare, usable
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, UsageError
from qquant.factor import factor_rows, times_inverse
from qquant.finite import all_finite
from qquant.moments import Moments
from qquant.packing import in_order
from qquant.refinement import RowRounder, balanced, refine

_ERROR_ROWS = 64  # rows that the reported error is measured on


@dataclass(frozen=True)
class Solution:
    """One quantized matrix and what was met on the way."""

    codes: Tensor
    """[out, in] uint8, columns in their original places."""
    scales: Tensor
    """[out, groups] float32, exactly representable in float16."""
    zeros: Tensor
    """[out, groups] float32, integer-valued."""
    g_idx: Tensor
    """[in] int32: group of each column."""
    damp_percent: float
    damp_escalations: int
    dead_columns: int
    target: Tensor | None = None
    """[out, in], what the codes stand for as closely as they can, where that is not the original weight."""
    fallback: str | None = None
    """What was done instead of what was asked, and why; None: all as asked."""
    whole_hessian: bool = True
    """Whether the Hessian was used as it is; False after a fallback that distrusts it."""

    def packable(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """codes, scales, zeros, g_idx: what the file format stores."""
        return self.codes, self.scales, self.zeros, self.g_idx

    def weight(self) -> Tensor:
        """The real values that the codes stand for: [out, in] float32, as every reader of the file computes them."""
        rows, columns = self.codes.shape
        count = self.scales.shape[1]
        if torch.equal(self.g_idx, in_order(columns, columns // count, self.g_idx.device)):
            codes = self.codes.reshape(rows, count, -1).to(torch.float32)
            return codes.sub_(self.zeros[:, :, None]).mul_(self.scales[:, :, None]).reshape(rows, columns)
        groups = self.g_idx.long()
        return dequantize(self.codes.to(torch.float32), self.scales[:, groups], self.zeros[:, groups])

    def split(self, heights: Sequence[int]) -> list[Solution]:
        """The solutions of the linears whose rows, so many of each, were solved as one tall matrix."""
        parts = zip(*(tall.split(list(heights)) for tall in (self.codes, self.scales, self.zeros)), strict=True)
        targets = [None] * len(heights) if self.target is None else self.target.split(list(heights))
        return [
            replace(self, codes=codes, scales=scales, zeros=zeros, target=target)
            for (codes, scales, zeros), target in zip(parts, targets, strict=True)
        ]


def solve(
    weight: Tensor,
    moments: Moments | Tensor | None,
    config: QuantizeConfig,
    *,
    prepared: Prepared | None = None,
    block_size: int = 128,
) -> Solution:
    """Choose the codes and grids of one linear layer's weight.

    Args:
        weight: [out, in] floating. Read, never written.
        moments: what calibration found out, or only [in, in] float32 or float64 E[x x^T] of the layer's inputs; read,
            never written. The solver works in its dtype. None rounds to nearest: the same call without data.
        config: bits, grid, order, damping, method. A method without data uses no moments even if there are some.
        prepared: what ``prepare`` made of the same moments and config; None: made here, and freed as soon as possible.
        block_size: columns between two updates of the trailing matrix; affects speed, not the result.

    Returns:
        Solution.

    Raises:
        UsageError: group_size does not divide the row length, or data is missing that the method needs.
        NumericError: the weight or a moment is not finite, a diagonal of squares is below 0, or a scale does not fit
            float16; with ``config.strict`` also a Hessian that needs a fallback, see ``columns.prepare``.

    Source: Frantar et al., GPTQ, arXiv:2210.17323. Each group's grid is fitted to weights that carry every update of
        earlier columns, so the result equals the one-column-at-a-time algorithm for any ``block_size``.
    """
    columns, recipe = weight.shape[1], config.recipe
    size = group_columns(columns, config.group_size)
    if not all_finite(weight):
        raise NumericError("weights must be finite, got NaN or Inf; the source checkpoint is damaged")
    if not config.needs_data or moments is None:
        if config.needs_data:
            raise UsageError(
                f'method "{config.method}" needs calibration data, got none; give samples or choose method "rtn"'
            )
        if config.clip in ("hessian", "loop"):
            raise UsageError(
                f'clip_search "{config.clip}" needs calibration data; use "weight" or "off" with method "rtn"'
            )
        return _round_to_nearest(weight.to(torch.float32), config, size)

    known = Moments(moments) if isinstance(moments, Tensor) else moments
    ready = prepare(known, config) if prepared is None else prepared
    dead, fallback = ready.dead, ready.fallback
    if ready.inverse is None:
        nearest = _round_to_nearest(weight.to(torch.float32), config, size)
        return replace(nearest, dead_columns=int(dead.sum()), fallback=fallback, whole_hessian=False)
    known = usable(known, ready)
    hessian, order, trusted = known.inputs, ready.order, ready.left_out is None
    outputs = None
    if recipe.output and known.outputs is not None:
        outputs = balanced(known.outputs.to(hessian.dtype))
    rounder = None if outputs is None else RowRounder(outputs, hessian.dtype)
    try:
        target = corrected_target(weight.to(hessian.dtype), known, config, ready.inverse, order)
        codes, scales, zeros = _quantize_columns(target, hessian, ready, config, size, block_size, rounder)
    except NumericError as error:
        _round_to_nearest(weight.to(torch.float32), config, size)  # says so where the weights themselves are at fault
        raise NumericError(
            f"what makes up for other errors must stay within bounds, but {str(error).partition(';')[0]}; calibrate "
            "with more data, give a larger --damp-percent, or choose another method, such as gptq or rtn"
        ) from error
    g_idx = torch.empty(columns, dtype=torch.int32, device=weight.device)
    g_idx[order] = ready.group_of.to(torch.int32)
    damp_percent, escalations = ready.damp_percent, ready.escalations
    del ready, rounder
    if recipe.refine:
        codes, scales = _refined(target, codes, scales, zeros, g_idx, hessian, outputs, config, dead, damp_percent)
    corrected = target if recipe.base == "qep" or recipe.residual else None
    return Solution(
        codes, scales, zeros, g_idx, damp_percent, escalations, int(dead.sum()), corrected, fallback, trusted
    )


def corrected_target(
    weight: Tensor, moments: Moments, config: QuantizeConfig, inverse: Tensor, order: Tensor
) -> Tensor:
    """The weights that, on the quantized model's inputs, come closest to the original's outputs.

    W* = W + (strength * W E[(x_original - x) x^T] + residual * E[(r_original - r) x^T]) H^-1; W itself for methods
    without such a part. Sources: quantization error propagation, arXiv:2504.09629; the residual stream's error added,
    after Qronos, arXiv:2505.11695.

    Args:
        weight: [out, in] in the Hessian's dtype.
        moments: of the linear.
        config: its recipe's base, strength and residual.
        inverse: from ``inverse_factor``, in ``order``.
        order: [in] visiting order.

    Returns:
        [out, in].

    Raises:
        NumericError: they are not finite.
    """
    recipe, change = config.recipe, None
    if recipe.base == "qep" and moments.mismatch is not None:
        change = (weight @ moments.mismatch).mul_(recipe.strength)
    if recipe.residual and moments.residual is not None:
        missing = moments.residual * recipe.residual
        change = missing if change is None else change.add_(missing)
    if change is None:
        return weight
    target = times_inverse(change, inverse, order).add_(weight)
    if not all_finite(target):
        raise NumericError("weights corrected for earlier errors must be finite, got NaN or Inf")
    return target


def relative_error(weight: Tensor, solution: Solution, hessian: Tensor | None) -> float:
    """trace(D H D^T) / trace(W H W^T) with D = quantized - W: the share of the layer's output energy that is error.

    Measured over about 64 evenly spaced rows.

    Args:
        weight: [out, in], the original. Read, never written.
        solution: of this weight.
        hessian: [in, in] or None.
    """
    return error_share(*error_energies(weight, solution, hessian, error_rows(weight.shape[0])))


def error_rows(height: int) -> range:
    """The rows of a linear with so many outputs that its reported error is measured on."""
    return range(0, height, max(1, height // _ERROR_ROWS))


def error_share(error: float, whole: float) -> float:
    """The relative error by the energies of the error and of the weight."""
    return max(0.0, error / whole) if whole > 0 else 0.0


def error_energies(
    weight: Tensor, solution: Solution, hessian: Tensor | None, chosen: Sequence[int]
) -> tuple[float, float]:
    """trace(D H D^T) and trace(W H W^T) of ``relative_error``, over the chosen rows alone.

    Without a Hessian, or after a fallback that distrusts it, all inputs count alike; where damping had to be raised,
    H is the damped one, which has no energy below 0.
    """
    hessian = hessian if solution.whole_hessian else None
    damp = 0.0
    if hessian is not None and solution.damp_escalations:
        damp = solution.damp_percent * float(hessian.diagonal().mean())
    rows = torch.tensor(list(chosen), dtype=torch.int64, device=weight.device)
    dtype = torch.float32 if hessian is None else hessian.dtype
    exact, groups = weight[rows].to(dtype), solution.g_idx.long()
    scales, zeros = solution.scales[rows][:, groups].to(dtype), solution.zeros[rows][:, groups].to(dtype)
    error = dequantize(solution.codes[rows].to(dtype), scales, zeros) - exact

    def energy(matrix: Tensor) -> float:
        weighted = matrix if hessian is None else matrix @ hessian
        if damp:
            weighted = weighted + damp * matrix
        found = float((weighted * matrix).sum())
        return found if math.isfinite(found) else float((weighted.double() * matrix).sum())

    return energy(error), energy(exact)


def _fit(
    live: Tensor, hessian: Tensor, columns: Tensor, config: QuantizeConfig, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero [out] of one group; ``live`` [out, size] are the weights of its ``columns`` as they are now."""
    block = hessian[columns][:, columns] if config.clip == "hessian" else None
    return search_qparams(
        live,
        bits=config.bits,
        sym=config.sym,
        clip_search=config.clip,
        hessian=block,
        signed=config.recipe.signed,
        factor=factor,
    )


def _quantize_columns(
    weight: Tensor,
    hessian: Tensor,
    ready: Prepared,
    config: QuantizeConfig,
    size: int,
    block_size: int,
    rounder: RowRounder | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop: returns codes [out, in] in original places, scales and zeros [out, groups] float32."""
    rows, columns = weight.shape
    inverse, order, feedback = ready.inverse, ready.order, ready.feedback
    assert inverse is not None
    grids = [(hessian.new_empty(0), hessian.new_empty(0))] * (columns // size)
    if config.static_groups:
        members = torch.arange(columns, device=weight.device).split(size)
        grids = [_fit(weight[:, group].to(hessian.dtype), hessian, group, config) for group in members]
    # A block boundary must not cut a group unless the group spans whole blocks: a grid is then always fitted to
    # weights that already carry every earlier column's update.
    step = size * max(1, block_size // size) if size <= block_size else _largest_divisor(size, block_size)
    # [in, out]: a column of the weight is contiguous here
    work = weight.T.index_select(0, order).to(hessian.dtype)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    groups, places, top = ready.group_of.tolist(), order.tolist(), 2**config.bits - 1
    inverse_pivots = inverse.diagonal().flip(0).reciprocal().tolist()
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, factor = work[start:end], factor_rows(inverse, start, end)
        errors = torch.empty_like(block)
        met = torch.empty_like(block) if feedback is not None else None
        for j in range(end - start):
            position = start + j
            if not config.static_groups and position % size == 0:
                live = work[position : position + size].T
                corner = factor_rows(inverse, position, position + size)[:, :size] if config.clip == "loop" else None
                grids[groups[position]] = _fit(live, hessian, order[position : position + size], config, corner)
            scale, zero = grids[groups[position]]
            if rounder is None:
                code = torch.div(block[j], scale).round_().add_(zero).clamp_(0, top)
            else:
                code = rounder.round(block[j], scale, zero, config.bits).to(block.dtype)
            codes[places[position]] = code
            # e = (w - w_hat) / U_jj
            error = code.sub_(zero).mul_(scale).sub_(block[j]).mul_(-inverse_pivots[position])
            errors[j] = error
            if feedback is not None and met is not None:
                met[j] = block[j]
                block[j + 1 :].addr_(feedback[position, position + 1 : end], met[j])
            if position + 1 < end:
                block[j + 1 :].addr_(factor[j, j + 1 : end - start], error, alpha=-1)
        if not all_finite(errors):
            raise NumericError("weights must stay finite while columns are rounded, got NaN or Inf")
        if end < columns:
            work[end:].addmm_(factor[:, end - start :].T, errors, alpha=-1)
            if feedback is not None and met is not None:
                work[end:].addmm_(feedback[start:end, end:].T, met)
    scales, zeros = (torch.stack(part, dim=1).to(torch.float32) for part in zip(*grids, strict=True))
    return codes.T.contiguous(), scales, zeros


def _refined(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    hessian: Tensor,
    outputs: Tensor | None,
    config: QuantizeConfig,
    dead: Tensor,
    damp_percent: float,
) -> tuple[Tensor, Tensor]:
    """Codes [out, in] in original places and scales after the refinement passes."""
    # Columns of a group side by side, whatever order had grouped them.
    places = torch.argsort(g_idx, stable=True)
    mean = hessian.diagonal()[~dead].mean() if not bool(dead.all()) else hessian.new_ones(())
    if torch.equal(places, torch.arange(len(places), device=places.device)):  # as they lie: no second weight
        grouped, sorted_target, sorted_codes = hessian.clone(), target, codes
    else:
        grouped, sorted_target, sorted_codes = hessian[places][:, places], target[:, places], codes[:, places]
    # Columns without input have no error to lose: nothing in refine moves where the diagonal is 0.
    grouped.diagonal().add_(torch.where(dead[places], 0, damp_percent * mean))
    found, scales = refine(
        sorted_target,
        sorted_codes,
        scales,
        zeros,
        hessian=grouped,
        outputs=outputs,
        bits=config.bits,
        passes=config.recipe.refine,
    )
    codes[:, places] = found
    return codes, scales.to(torch.float32)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def _round_to_nearest(weight: Tensor, config: QuantizeConfig, size: int) -> Solution:
    rows, columns = weight.shape
    grouped = weight.reshape(rows * columns // size, size)
    scale, zero = search_qparams(
        grouped,
        bits=config.bits,
        sym=config.sym,
        clip_search=config.clip,
        hessian=None,
        signed=config.recipe.signed,
    )
    codes = quantize(grouped, scale[:, None], zero[:, None], config.bits)
    return Solution(
        codes=codes.to(torch.uint8).reshape(rows, columns),
        scales=scale.reshape(rows, -1),
        zeros=zero.reshape(rows, -1),
        g_idx=in_order(columns, size, weight.device),
        damp_percent=config.damp_percent,
        damp_escalations=0,
        dead_columns=0,
    )
