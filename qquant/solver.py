"""GPTQ mathematics: accumulate a Hessian, choose the codes of one weight matrix. No model, no files, no hooks.

Another method plugs in beside ``solve``: it takes the same weight, Hessian and config and returns a ``Solution``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qquant import _native
from qquant.affine import dequantize, quantize, search_qparams
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, UsageError
from qquant.packing import in_order

_PANEL = 256  # columns per panel of the Hessian update: only panels on and above the diagonal are computed
_LEAF = 256  # side of the triangles that are inverted by substitution
_ESCALATIONS = 3  # damping is raised tenfold at most this often
_ERROR_ROWS = 64  # rows that the reported error is measured on


class Hessian:
    """The second moment E[x x^T] of one linear's inputs, accumulated sample by sample.

    Every sample is added by itself in the order given, in float32, so the sum does not depend on how samples were
    batched on their way here.

    Args:
        columns: input features.
        dtype: of the accumulator, float32 or wider.
        device: where the inputs will be.
    """

    def __init__(self, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Start from zero."""
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._takes_gram = self._sum.device.type == "cpu" and dtype == torch.float32

    def add(self, inputs: Tensor) -> None:
        """Add one sample's inputs, [T, columns] floating; masked tokens are already left out."""
        self.tokens += inputs.shape[0]
        native = _native.gram()
        if native is not None and inputs.dtype == torch.bfloat16 and self._takes_gram:
            x = inputs.contiguous()
            native.add_gram(x.data_ptr(), *x.shape, self._sum.data_ptr(), torch.get_num_threads())
            return
        x = inputs.to(self._sum.dtype)
        for start in range(0, x.shape[1], _PANEL):
            self._sum[start : start + _PANEL, start:].addmm_(x[:, start : start + _PANEL].T, x[:, start:])

    def finish(self) -> Tensor:
        """The mean over tokens, [columns, columns], symmetric. Takes the accumulator's memory; call it once.

        Raises:
            NumericError: no token was added, or an input was not finite.
        """
        if self.tokens == 0:
            raise NumericError("a Hessian needs at least one calibration token, got none for this linear")
        # An input that is not finite spoils at least its own diagonal entry, far cheaper to look at than all inputs.
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise NumericError("activations must be finite, got NaN or Inf among a linear's calibration inputs")
        full, self._sum = self._sum, self._sum.new_empty(0)
        full.div_(self.tokens)
        for start in range(0, full.shape[0], _PANEL):
            end = start + _PANEL
            corner = full[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            full[end:, start:end] = full[start:end, end:].T
        return full


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


def solve(weight: Tensor, hessian: Tensor | None, config: QuantizeConfig, *, block_size: int = 128) -> Solution:
    """Choose the codes and grids of one linear layer's weight.

    Args:
        weight: [out, in] floating. Read, never written.
        hessian: [in, in] float32 or float64, E[x x^T] of the layer's inputs; read, never written. The solver works
            in its dtype. None rounds to nearest: the same call without data.
        config: bits, grid, order, damping. ``config.method == "rtn"`` uses no Hessian even if one is given.
        block_size: columns between two updates of the trailing matrix; affects speed, not the result.

    Returns:
        Solution.

    Raises:
        UsageError: group_size does not divide the row length, or data is missing that the method needs.
        NumericError: the weight or Hessian is not finite, or no damping makes the Hessian positive definite.

    Source: Frantar et al., GPTQ, arXiv:2210.17323. Each group's grid is fitted to weights that carry every update of
        earlier columns, so the result equals the one-column-at-a-time algorithm for any ``block_size``.
    """
    columns = weight.shape[1]
    size = group_columns(columns, config.group_size)
    if not bool(torch.isfinite(weight).all()):
        raise NumericError("weights must be finite, got NaN or Inf; the source checkpoint is damaged")
    if config.method == "rtn" or hessian is None:
        if config.method == "gptq":
            raise UsageError('method "gptq" needs calibration data, got none; give samples or choose method "rtn"')
        if config.clip_search == "hessian":
            raise UsageError('clip_search "hessian" needs calibration data; use "weight" or "off" with method "rtn"')
        return _round_to_nearest(weight.to(torch.float32), config, size)

    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise NumericError("a Hessian must be finite, got NaN or Inf on its diagonal")
    dead = diagonal == 0
    order, group_of = column_order(diagonal, config, size)
    inverse, damp_percent, escalations = inverse_factor(hessian, order, dead, config.damp_percent)
    codes, scales, zeros = _quantize_columns(weight, hessian, inverse, order, group_of, config, size, block_size)
    del inverse
    g_idx = torch.empty(columns, dtype=torch.int32, device=weight.device)
    g_idx[order] = group_of.to(torch.int32)
    return Solution(codes, scales, zeros, g_idx, damp_percent, escalations, int(dead.sum()))


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


def column_order(diagonal: Tensor, config: QuantizeConfig, size: int) -> tuple[Tensor, Tensor]:
    """In which order columns are visited, and to which group each belongs.

    Args:
        diagonal: [in] of the Hessian.
        config: desc_act, static_groups and group_aware choose the order.
        size: columns per group.

    Returns:
        order: [in] int64, order[p] = the column visited at step p.
        group_of: [in] int64, group_of[p] = its group.

    Sources: act-order, AutoGPTQ's ``desc_act``; static groups, AutoGPTQ's ``static_groups``; group-aware order,
        GPTQModel's ``act_group_aware``.
    """
    columns = diagonal.numel()
    position = torch.arange(columns, device=diagonal.device)
    if config.desc_act:
        order = torch.argsort(diagonal, descending=True, stable=True)
        return order, (order if config.static_groups else position) // size
    if config.group_aware:
        grouped = diagonal.reshape(-1, size)
        inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
        groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
        order = (groups[:, None] * size + inside[groups]).reshape(-1)
        return order, order // size
    return position, position // size


def inverse_factor(hessian: Tensor, order: Tensor, dead: Tensor, damp_percent: float) -> tuple[Tensor, float, int]:
    """The triangular factor of the damped Hessian's inverse, in reversed visiting order.

    GPTQ needs the upper-triangular U with H^-1 = U^T U, H in visiting order. With J the reversal of an order,
    J H J = L L^T by one Cholesky factorization, and U = J L^-1 J. What is returned is L^-1, in the memory of the
    factorization; ``factor_rows`` reads U out of it. Damping is raised tenfold, at most three times, while the
    factorization fails.

    Args:
        hessian: [in, in], read, never written.
        order: [in] visiting order.
        dead: [in] bool, columns without input; they get the mean of the others on the diagonal and influence nothing.
        damp_percent: share of the mean diagonal that is added to it.

    Returns:
        L^-1 [in, in] lower triangular, the damping that was used, and how often it was raised.

    Raises:
        NumericError: still not positive definite at the largest damping.
    """
    backwards = order.flip(0)
    live = hessian.diagonal()[~dead]
    mean = live.mean() if live.numel() else hessian.new_ones(())
    diagonal = torch.where(dead, mean, hessian.diagonal())
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    for escalation in range(_ESCALATIONS + 1):
        damp = damp_percent * 10**escalation
        lower = torch.empty_like(hessian)
        for start in range(0, lower.shape[0], _PANEL):
            rows = hessian.index_select(0, backwards[start : start + _PANEL])
            torch.index_select(rows, 1, backwards, out=lower[start : start + _PANEL])
        lower.diagonal().copy_((diagonal + damp * mean)[backwards])
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            _invert_lower(lower)
            return lower, damp, escalation
    raise NumericError(
        f"a Hessian must become positive definite by damping, but failed up to damp_percent {damp:g}; "
        "give more or more varied calibration data, or leave this module out"
    )


def factor_rows(inverse: Tensor, start: int, end: int) -> Tensor:
    """Rows ``start`` to ``end`` of U from column ``start`` on, [end - start, in - start], from L^-1."""
    columns = inverse.shape[0]
    return inverse[columns - end : columns - start, : columns - start].flip(0, 1)


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


def relative_error(weight: Tensor, solution: Solution, hessian: Tensor | None) -> float:
    """trace(D H D^T) / trace(W H W^T) with D = quantized - W: the share of the layer's output energy that is error.

    Measured over about 64 evenly spaced rows. Without a Hessian all inputs count alike.

    Args:
        weight: [out, in], the original. Read, never written.
        solution: of this weight.
        hessian: [in, in] or None.
    """
    rows = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // _ERROR_ROWS), device=weight.device)
    dtype = torch.float32 if hessian is None else hessian.dtype
    exact, groups = weight[rows].to(dtype), solution.g_idx.long()
    scales, zeros = solution.scales[rows][:, groups].to(dtype), solution.zeros[rows][:, groups].to(dtype)
    error = dequantize(solution.codes[rows].to(dtype), scales, zeros) - exact

    def energy(matrix: Tensor) -> float:
        return float(((matrix if hessian is None else matrix @ hessian) * matrix).sum())

    whole = energy(exact)
    return energy(error) / whole if whole > 0 else 0.0


def _fit(live: Tensor, hessian: Tensor, columns: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero [out] of one group; ``live`` [out, size] are the weights of its ``columns`` as they are now."""
    block = hessian[columns][:, columns] if config.clip_search == "hessian" else None
    return search_qparams(live, bits=config.bits, sym=config.sym, clip_search=config.clip_search, hessian=block)


def _quantize_columns(
    weight: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    order: Tensor,
    group_of: Tensor,
    config: QuantizeConfig,
    size: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop: returns codes [out, in] in original places, scales and zeros [out, groups] float32."""
    rows, columns = weight.shape
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
    groups, places, top = group_of.tolist(), order.tolist(), 2**config.bits - 1
    inverse_pivots = inverse.diagonal().flip(0).reciprocal().tolist()
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, factor = work[start:end], factor_rows(inverse, start, end)
        errors = torch.empty_like(block)
        for j in range(end - start):
            position = start + j
            if not config.static_groups and position % size == 0:
                live = work[position : position + size].T
                grids[groups[position]] = _fit(live, hessian, order[position : position + size], config)
            scale, zero = grids[groups[position]]
            code = torch.div(block[j], scale).round_().add_(zero).clamp_(0, top)
            codes[places[position]] = code
            # e = (w - w_hat) / U_jj
            error = code.sub_(zero).mul_(scale).sub_(block[j]).mul_(-inverse_pivots[position])
            errors[j] = error
            if position + 1 < end:
                block[j + 1 :].addr_(factor[j, j + 1 : end - start], error, alpha=-1)
        if end < columns:
            work[end:].addmm_(factor[:, end - start :].T, errors, alpha=-1)
    scales, zeros = (torch.stack(part, dim=1).to(torch.float32) for part in zip(*grids, strict=True))
    return codes.T.contiguous(), scales, zeros


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def _round_to_nearest(weight: Tensor, config: QuantizeConfig, size: int) -> Solution:
    rows, columns = weight.shape
    grouped = weight.reshape(rows * columns // size, size)
    scale, zero = search_qparams(
        grouped, bits=config.bits, sym=config.sym, clip_search=config.clip_search, hessian=None
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
