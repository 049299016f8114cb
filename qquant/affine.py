"""The affine grid a real weight is rounded to: value = scale * (code - zero), code in 0 .. 2**bits - 1.

Fitting a grid to groups of weights and rounding on it lives here. How codes are chosen jointly (GPTQ) is solver.py;
how codes and grids are stored is packing.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qquant.errors import NumericError

# The format stores scales as float16, so a grid is only ever judged with the scale a reader will see.
_SMALLEST_SCALE = 2.0**-24  # smallest positive float16
_LARGEST_SCALE = 65504.0  # largest finite float16
_SHRINK_FACTORS = tuple(1.0 - 0.025 * step for step in range(21))  # 1.0 down to 0.5
_SEARCHED = 2**17
"""Weights that are searched together: what is made of them on the way stays in a processor's cache. (The column loop
makes little on the way, and is searched in one piece.)"""
_LEAST_ROWS = 256
"""Of a piece: products of fewer rows are slow."""
_LOOP_FACTORS = tuple(1.0 - 0.05 * step for step in range(7))  # 1.0 down to 0.7: each costs a column loop


def choose_qparams(
    weight: Tensor, *, bits: int, sym: bool, shrink: float = 1.0, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Fit the tightest grid that holds 0 and every value of each group.

    Asymmetric zeros are kept in 1 .. 2**bits - 1, because v1 files store ``zero - 1`` in an unsigned field.

    Args:
        weight: [..., size] floating; the last axis is one group. Read, never written.
        bits: width of one stored code.
        sym: fix ``zero`` at 2**(bits - 1); a group's largest positive value may then clip half a step short.
        shrink: factor on the covered range; below 1 the extreme values clip and the steps get finer.
        signed: a symmetric grid reaches one step further below its zero than above. Give that step to the side of the
            group's largest value, by a negative scale if it is positive: it never clips, a value as large on the other
            side by one step at most, and steps are 1/16 finer at 4 bits than on a grid as long on both sides.

    Returns:
        scale: [...] in weight's dtype, exactly representable in float16, not zero; positive unless ``signed``.
        zero: [...] in weight's dtype, integer-valued code that stands for 0.0.

    Raises:
        NumericError: a value is so large that float16 cannot hold its group's scale.

    Source: min-max grid of GPTQ, arXiv:2210.17323, in the variant of the published GPTQ checkpoints.
    """
    return _grid(weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0), bits, shrink, sym=sym, signed=signed)


def _grid(low: Tensor, high: Tensor, bits: int, shrink: float, *, sym: bool, signed: bool) -> tuple[Tensor, Tensor]:
    """``choose_qparams`` of groups that reach from ``low`` <= 0 to ``high`` >= 0."""
    levels = 2**bits - 1
    low, high = low * shrink, high * shrink
    if sym and signed:
        farthest = torch.where(high > -low, -high, -low)
        scale = _storable(farthest.abs() / 2 ** (bits - 1), levels).copysign(farthest)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    if sym:
        reach = torch.maximum(high, -low)
        scale = _storable(2 * reach / levels, levels)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = _storable((high - low) / levels, levels)
    zero = (-low / scale).round().clamp(max=levels)
    # Nothing below 0: level 0 would be the zero, which v1 cannot store. Give one level away instead.
    all_positive = zero < 1
    scale = torch.where(all_positive, _storable(high / (levels - 1), levels), scale)
    return scale, torch.where(all_positive, torch.ones_like(zero), zero)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round to the nearest code; values outside the grid clip. Shapes broadcast; result in weight's dtype."""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The real value of each code: ``scale * (codes - zero)``. Shapes broadcast."""
    return scale * (codes - zero)


def search_qparams(
    weight: Tensor,
    *,
    bits: int,
    sym: bool,
    clip_search: Literal["off", "weight", "hessian", "loop"],
    hessian: Tensor | None,
    signed: bool = False,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit one group's grid per row, optionally on the shrunken range that leaves the least rounding error.

    Args:
        weight: [rows, size] floating, one group's columns. Read, never written.
        bits: width of one stored code.
        sym: symmetric grid, as in ``choose_qparams``.
        clip_search: "off", "weight" (least sum of squared errors), "hessian" (least e H e^T) or "loop": the least
            error that GPTQ's own column loop leaves inside the group.
        hessian: [size, size], the group's block of the Hessian; only read for "hessian".
        signed: as in ``choose_qparams``.
        factor: [size, size], the group's block of GPTQ's upper-triangular factor; only read for "loop".

    Returns:
        scale, zero: [rows] each, as from ``choose_qparams``.
    """
    if clip_search == "off":
        return choose_qparams(weight, bits=bits, sym=sym, signed=signed)
    whole = clip_search == "loop" or weight.device.type != "cpu"
    rows = max(1, len(weight)) if whole else max(_LEAST_ROWS, _SEARCHED // weight.shape[1])
    searched = [_searched(part, bits, sym, signed, clip_search, hessian, factor) for part in weight.split(rows)]
    scales, zeros = zip(*searched, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _searched(
    weight: Tensor,
    bits: int,
    sym: bool,
    signed: bool,
    clip_search: Literal["weight", "hessian", "loop"],
    hessian: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``search_qparams`` of some rows."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    columns = weight.T.contiguous()
    best_scale, best_zero = _grid(low, high, bits, 1.0, sym=sym, signed=signed)
    least: Tensor | None = None
    for shrink in _LOOP_FACTORS if clip_search == "loop" else _SHRINK_FACTORS:
        scale, zero = _grid(low, high, bits, shrink, sym=sym, signed=signed)
        if clip_search == "loop" and factor is not None:
            loss = _loop_loss(columns, scale, zero, bits, factor)
        else:
            # quantize and dequantize, in one temporary
            error = torch.div(columns, scale).round_().add_(zero).clamp_(0, 2**bits - 1)
            error.sub_(zero).mul_(scale).sub_(columns)
            weighted = hessian @ error if clip_search == "hessian" and hessian is not None else error
            loss = (weighted * error).sum(0)
        if least is None:
            least = loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _loop_loss(columns: Tensor, scale: Tensor, zero: Tensor, bits: int, factor: Tensor) -> Tensor:
    """Per row, what GPTQ's column loop would leave on this grid: the sum of ((w - w_hat) / U_jj)^2 over ``columns``."""
    work = columns.clone()
    loss = torch.zeros_like(scale)
    for j in range(work.shape[0]):
        error = (work[j] - dequantize(quantize(work[j], scale, zero, bits), scale, zero)) / factor[j, j]
        loss += error * error
        work[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    return loss


def _storable(scale: Tensor, levels: int) -> Tensor:
    """Round to a positive float16 value; an all-zero group gets the smallest scale, which stores it exactly.

    To the nearest, unless that would clip a group's largest value by more than half a step: where float16 scales lie
    far apart, 2**-24 below 2**-14, it may be half of the scale or less, and the next larger one is taken.
    """
    if not bool((scale <= _LARGEST_SCALE).all()):  # NaN is not either
        raise NumericError(
            f"a group's scale must fit float16, in which the GPTQ format stores it (at most {_LARGEST_SCALE:g}), got "
            f"{float(scale.max()):g}; check the source checkpoint, and if such weights are meant, leave the module "
            "alone with --skip"
        )
    found = scale.to(torch.float16).to(scale.dtype).clamp(min=_SMALLEST_SCALE)
    return torch.where(levels * (scale - found) > found, found + _SMALLEST_SCALE, found)
