"""A second look at finished codes: refit the scales by least squares, then move single codes, each step exact.

What falls is ``trace(O E H E^T)``, E = quantized - target: H weights inputs as in GPTQ, O weights the outputs by how
much the model's predictions feel them. O is block-diagonal, its blocks are kept as [blocks, side, side]. Without O all
outputs count alike and rows do not see one another.

Sources: GPTQ's objective, arXiv:2210.17323; both sides of the Kronecker-factored Fisher matrix, YAQA, arXiv:2505.22988.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qquant import _native
from qquant.descent_numpy import descend as descend_block
from qquant.descent_numpy import round_rows
from qquant.errors import NumericError
from qquant.factor import factor_rows, inverse_factor
from qquant.finite import all_finite
from qquant.telling import say_once

OUTPUT_DAMP = 0.05
"""Share of a block's mean diagonal added to it: O is an estimate, and its small directions are not to be trusted."""

_BLOCK = 128  # columns whose moves are applied to the ones behind them by one product
_SIDE = 256  # outputs that are weighted together
_TINY = 1e-6  # damping for a matrix that is damped already: only against a column without any gradient
_CONJUGATE_STEPS = 3  # measured: more lower neither the objective nor KL
_SCALE_RANGE = (0.5, 2.0)  # a refitted scale outside this multiple of the old one is not taken


def block_side(outputs: int) -> int:
    """Rows per block of O for a linear with so many outputs: the largest divisor up to 256.

    Measured: blocks of 256 keep nearly all of what the whole matrix gains, at a small part of its memory and time.
    """
    return next(side for side in range(min(_SIDE, outputs), 0, -1) if outputs % side == 0)


def damped(matrix: Tensor, share: float) -> Tensor:
    """A copy with ``share`` of the mean diagonal added to the diagonal; [n, n], or blocks of one, [blocks, n, n]."""
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(share * matrix.diagonal(dim1=-2, dim2=-1).mean())
    return result


def balanced(outputs: Tensor) -> Tensor:
    """O's blocks [blocks, side, side] over their own mean diagonal, damped by ``OUTPUT_DAMP``.

    Blocks do not see one another, so that only the ratios inside one matter. Where predictions feel none of a block's
    outputs, all of them count alike. Raises NumericError where they are no second moments: not finite, or negative on
    the diagonal.
    """
    diagonal = outputs.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)[:, None, None]
    if not all_finite(outputs) or not all_finite(mean) or bool((diagonal < 0).any()):
        raise NumericError(
            "moments of a linear's outputs must be finite and mean squares at least 0, got others: the gradients "
            "overflow, or the sums are damaged; compute in float32, or choose a method without output, such as gptq"
        )
    one = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    return torch.where(mean > 0, outputs / mean.clamp(min=torch.finfo(outputs.dtype).tiny), one) + OUTPUT_DAMP * one


class RowRounder:
    """Rounds a column of weights so that later outputs of a block make up for what earlier ones leave.

    Where errors cost ``trace(O E H E^T)``, the columns behind one need to know of its error exactly what they need in
    GPTQ; inside the column, outputs are to be rounded one by one with O's own feedback, most important first.

    Args:
        outputs: [blocks, side, side], O's diagonal blocks, already damped.
        dtype: of the weights that will come.
    """

    def __init__(self, outputs: Tensor, dtype: torch.dtype) -> None:
        """Factorize the blocks. Raises NumericError if one is not positive definite, which damped moments are."""
        self._native = _compiled()
        blocks, self._side, _ = outputs.shape
        order = outputs.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True).cpu()
        factor = torch.empty(outputs.shape, dtype=dtype)
        nothing = torch.zeros(self._side, dtype=torch.bool)
        for block in range(blocks):
            part = outputs[block].cpu().to(dtype)
            try:
                inverse, _, _ = inverse_factor(part, order[block], nothing, _TINY, raises=0)
            except NumericError as error:
                raise NumericError(
                    "moments of a linear's outputs must be positive definite once damped, and are not: the sums are "
                    "damaged; calibrate again, or choose a method without output, such as gptq"
                ) from error
            factor[block] = factor_rows(inverse, 0, self._side)
        self._factor, self._dtype = factor, dtype
        self._order = order.contiguous()

    def round(self, weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        """Codes [out] uint8 for one column of weights [out] on its group's grid [out], [out]."""
        column, steps, middles = (part.cpu().contiguous() for part in (weights, scale, zero))
        if self._native is None:
            return round_rows(column, steps, middles, self._factor, self._order, 2**bits - 1).to(weights.device)
        run = self._native.round_rows_double if self._dtype == torch.float64 else self._native.round_rows_float
        codes = torch.empty(column.shape[0], dtype=torch.uint8)
        run(
            column.data_ptr(), codes.data_ptr(), steps.data_ptr(), middles.data_ptr(), self._factor.data_ptr(),
            self._order.data_ptr(), column.shape[0], self._side, 2**bits - 1,
        )  # fmt: skip
        return codes.to(weights.device)


def refine(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    hessian: Tensor,
    outputs: Tensor | None,
    bits: int,
    passes: int,
    block_size: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Refit scales and move codes by turns; the objective never grows.

    Args:
        target: [out, in], what the quantized weight should be, in ``hessian``'s dtype. Columns of a group lie together.
        codes: [out, in] uint8.
        scales: [out, groups].
        zeros: [out, groups].
        hessian: [in, in], positive definite: already damped.
        outputs: [blocks, side, side], O's diagonal blocks, already damped, or None: all outputs count alike.
        bits: width of a code.
        passes: how often.
        block_size: columns between two products with the whole Hessian; affects speed, not the result.

    Returns:
        codes [out, in] uint8, scales [out, groups] as given or refitted, exactly representable in float16.
    """
    dtype = hessian.dtype
    codes, zeros = codes.clone(), zeros.to(dtype)
    scales = scales.to(dtype)
    for _ in range(passes):
        scales = refit_scales(target, codes, scales, zeros, hessian, outputs)
        descend(target, codes, scales, zeros, hessian, outputs, bits=bits, block_size=block_size)
    return codes, scales


def error_of(target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Quantized - target, [out, in] in target's dtype."""
    rows, groups = scales.shape
    steps = codes.reshape(rows, groups, -1).to(target.dtype).sub_(zeros[:, :, None])
    return steps.mul_(scales[:, :, None]).reshape(target.shape).sub_(target)


def refit_scales(
    target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, outputs: Tensor | None
) -> Tensor:
    """The scales [out, groups] that fit these codes best, by conjugate gradients from the given ones.

    Rows that see one another, those of a block of ``outputs``, are solved together. A scale that left its range stays,
    and so do such rows' scales where after rounding to float16 they are no better.
    """
    rows, groups = scales.shape
    steps = codes.reshape(rows, groups, -1).to(target.dtype).sub_(zeros[:, :, None]).reshape(target.shape)
    size = target.shape[1] // groups
    side = 1 if outputs is None else outputs.shape[1]

    def total(values: Tensor) -> Tensor:
        """The sum [out, 1] of [out, any] over rows that see one another, for each of them."""
        return values.reshape(rows // side, -1).sum(1).repeat_interleave(side)[:, None]

    def weigh(error: Tensor) -> Tensor:
        """O E H of an error [out, in]."""
        return _weigh(outputs, error @ hessian)

    def pull(weighted: Tensor) -> Tensor:
        """The gradient with respect to the scales."""
        return (weighted * steps).reshape(rows, groups, size).sum(-1)

    def spread(values: Tensor) -> Tensor:
        """The change of weights [out, in] that a change of scales makes."""
        return (steps.reshape(rows, groups, size) * values[:, :, None]).reshape(target.shape)

    curvature = torch.empty_like(scales)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        curvature[:, group] = ((steps[:, part] @ hessian[part, part]) * steps[:, part]).sum(-1)
    if outputs is not None:
        curvature *= outputs.diagonal(dim1=1, dim2=2).reshape(-1, 1)
    # A group whose codes all stand for zero has no say and keeps its scale.
    weight = torch.where(curvature > 0, 1 / curvature.clamp(min=torch.finfo(scales.dtype).tiny), 0)

    error = error_of(target, codes, scales, zeros)
    weighted = weigh(error)
    before = total(weighted * error)
    del error  # as large as the weight, as are those below that have no name
    residual, change = -pull(weighted), torch.zeros_like(scales)
    del weighted
    preconditioned = weight * residual
    direction, strength = preconditioned.clone(), total(residual * preconditioned)
    for _ in range(_CONJUGATE_STEPS):
        image = pull(_weigh(outputs, spread(direction) @ hessian))
        bend = total(direction * image)
        length = torch.where(bend > 0, strength / bend, 0)
        change += length * direction
        residual -= length * image
        preconditioned = weight * residual
        following = total(residual * preconditioned)
        direction = preconditioned + torch.where(strength > 0, following / strength, 0) * direction
        strength = following
    found = (scales + change).to(torch.float16).to(scales.dtype)
    ratio = found / scales
    found = torch.where((ratio > _SCALE_RANGE[0]) & (ratio < _SCALE_RANGE[1]), found, scales)
    error = error_of(target, codes, found, zeros)
    return torch.where(total(weigh(error) * error) < before, found, scales)


def _weigh(outputs: Tensor | None, matrix: Tensor) -> Tensor:
    """O times a matrix [out, columns]."""
    if outputs is None:
        return matrix
    blocks, side, _ = outputs.shape
    return torch.bmm(outputs, matrix.reshape(blocks, side, -1)).reshape(matrix.shape)


def descend(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    outputs: Tensor | None,
    *,
    bits: int,
    block_size: int = _BLOCK,
) -> int:
    """Go once through all codes, column by column and row by row, and put each where the objective is least.

    Args:
        target: as in ``refine``.
        codes: [out, in] uint8, changed in place.
        scales: as in ``refine``.
        zeros: as in ``refine``.
        hessian: as in ``refine``.
        outputs: as in ``refine``.
        bits: as in ``refine``.
        block_size: as in ``refine``.

    Returns:
        How many codes moved.
    """
    native = _compiled()
    dtype, device = hessian.dtype, hessian.device
    rows, groups = scales.shape
    size = target.shape[1] // groups
    # The walk over codes is sequential: it runs on the CPU, products stay where the matrices are.
    error = error_of(target, codes, scales, zeros).T.contiguous()
    columns = codes.T.contiguous().cpu()
    steps = scales.T.contiguous().cpu()
    metric, side = (None, _SIDE) if outputs is None else (outputs.cpu().contiguous(), outputs.shape[1])
    moved = 0
    for start in range(0, target.shape[1], block_size):
        end = min(start + block_size, target.shape[1])
        pulls = hessian[start:end] @ error
        if outputs is not None:
            pulls = _weigh(outputs, pulls.T).T
        pulls, moves = pulls.contiguous().cpu(), torch.zeros(end - start, rows, dtype=dtype)
        corner = hessian[start:end, start:end].cpu().contiguous()
        of_column = (torch.arange(start, end) // size).contiguous()
        if native is None:
            moved += descend_block(pulls, moves, metric, corner, columns[start:end], steps, of_column, 2**bits - 1)
        else:
            run = native.descend_double if dtype == torch.float64 else native.descend_float
            moved += run(
                pulls.data_ptr(), moves.data_ptr(), 0 if metric is None else metric.data_ptr(), corner.data_ptr(),
                columns[start:end].data_ptr(), steps.data_ptr(), of_column.data_ptr(),
                end - start, rows, side, 2**bits - 1, torch.get_num_threads(),
            )  # fmt: skip
        error[start:end] += moves.to(device)
    codes.copy_(columns.T)
    return moved


def _compiled() -> ModuleType | None:
    """The compiled loops, or None, said once: numpy then takes the same steps, many times slower."""
    native = _native.descent()
    if native is None:
        say_once(
            "the compiled module qquant._descent is not here: refinement and output-aware rounding take the same steps "
            f"in Python, with output many times slower; build it: {_native.REBUILD}; or choose a method without "
            "output, such as gptq",
        )
    return native
