"""Slow oracles of what methods add to GPTQ: targets, refinement and whole methods; imported by tests only.

Everything is float64 and goes by definitions: least squares over sampled activations, the whole objective anew for
every code. GPTQ's own loop is reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.config import QuantizeConfig
from qquant.moments import Moments
from tests.reference import damped_hessian, gptq_slowly

OUTPUT_DAMP = 0.05
"""Share of the mean diagonal that is added to the outputs' moments."""


@dataclass(frozen=True)
class Layer:
    """One linear with the activations that reach it, in float64."""

    weight: Tensor
    """[out, in]."""
    inputs: Tensor
    """[T, in], in the quantized model."""
    original: Tensor
    """[T, in], in the original one."""
    missing: Tensor
    """[T, out], by how much the original's residual stream is ahead of the quantized model's."""
    slopes: Tensor
    """[T, out], gradients of the model's log-likelihood with respect to the linear's outputs."""

    def moments(self, side: int | None = None) -> Moments:
        """Everything that calibration would find out; outputs in blocks of ``side`` (all together)."""
        tokens, rows = self.slopes.shape
        side = side or rows
        pairs = self.slopes.T @ self.slopes / tokens
        blocks = [pairs[i : i + side, i : i + side] for i in range(0, rows, side)]
        return Moments(
            inputs=self.inputs.T @ self.inputs / tokens,
            mismatch=(self.original - self.inputs).T @ self.inputs / tokens,
            residual=self.missing.T @ self.inputs / tokens,
            outputs=torch.stack(blocks),
        )


def make_layer(rows: int = 6, columns: int = 48, seed: int = 0, dead: tuple[int, ...] = ()) -> Layer:
    """A random linear whose correlated inputs differ in size and miss the original's by a tenth."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    tokens = 4 * columns
    channels = torch.rand(columns, generator=draw, dtype=torch.float64) * 3 + 0.1
    original = normal(tokens, columns) @ (normal(columns, columns) / columns**0.5) * channels
    inputs = original + 0.1 * normal(tokens, columns) * channels
    inputs[:, list(dead)] = 0
    missing = 0.02 * normal(tokens, rows) + 0.01 * original @ normal(columns, rows)
    slopes = normal(tokens, rows) @ normal(rows, rows)
    return Layer(normal(rows, columns) * 0.1, inputs, original, missing, slopes)


def target_by_least_squares(layer: Layer, *, strength: float, residual: float, damp_percent: float) -> Tensor:
    """The weights whose outputs on ``inputs`` come closest to what is wanted, near the original's as the damping asks.

    Wanted is the original weight's output on inputs that lie ``strength`` of the way to the original's, and
    ``residual`` of what the residual stream misses.
    """
    x, tokens = layer.inputs, layer.inputs.shape[0]
    wanted = (x + strength * (layer.original - x)) @ layer.weight.T + residual * layer.missing
    hessian = x.T @ x / tokens
    added = (damped_hessian(hessian, damp_percent) - hessian).diagonal()
    rows = torch.cat([x / tokens**0.5, added.sqrt().diag()])
    answers = torch.cat([wanted / tokens**0.5, added.sqrt()[:, None] * layer.weight.T])
    found: Tensor = torch.linalg.lstsq(rows, answers, driver="gelsd").solution.T
    return found


def whole_metric(hessian: Tensor, outputs: Tensor | None, rows: int) -> Tensor:
    """O times H for every pair of weights: [out * in, out * in]."""
    metric = torch.eye(rows, dtype=torch.float64) if outputs is None else torch.block_diag(*outputs)
    return torch.kron(metric.contiguous(), hessian.contiguous())


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor, size: int) -> Tensor:
    """scale * (code - zero), columns of a group side by side."""
    return scales.repeat_interleave(size, 1) * (codes.double() - zeros.repeat_interleave(size, 1))


def objective(target: Tensor, values: Tensor, metric: Tensor) -> float:
    """vec(E)^T (O x H) vec(E)."""
    error = (values - target).reshape(-1)
    return float(error @ metric @ error)


def best_scales(target: Tensor, codes: Tensor, zeros: Tensor, metric: Tensor, size: int) -> Tensor:
    """The scales [out, groups] of least error for these codes, not rounded; 0 where they have no say."""
    rows, columns = target.shape
    groups = columns // size
    steps = codes.double() - zeros.repeat_interleave(size, 1)
    design = torch.zeros(rows * columns, rows * groups, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            design[row * columns + column, row * groups + column // size] = steps[row, column]
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    goal = (root @ target.reshape(-1))[:, None]
    found: Tensor = torch.linalg.lstsq(root @ design, goal, driver="gelsd").solution.reshape(rows, groups)
    return found


def refit_slowly(
    target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, outputs: Tensor | None
) -> Tensor:
    """The least-squares scales in float16, unless they left half to twice of the old ones or are no better."""
    rows, groups = scales.shape
    size = target.shape[1] // groups
    metric = whole_metric(hessian, outputs, rows)
    found = best_scales(target, codes, zeros, metric, size).half().double()
    ratio = found / scales
    found = torch.where((ratio > 0.5) & (ratio < 2), found, scales)
    result, side = scales.clone(), 1 if outputs is None else outputs.shape[1]
    for start in range(0, rows, side):  # rows that see one another
        part = slice(start, start + side)
        block = None if outputs is None else outputs[start // side][None]
        metric = whole_metric(hessian, block, side)
        before, after = (
            objective(target[part], values_of(codes[part], s[part], zeros[part], size), metric) for s in (scales, found)
        )
        if after < before:
            result[part] = found[part]
    return result


def descend_slowly(
    target: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    outputs: Tensor | None,
    bits: int,
) -> Tensor:
    """Column by column and row by row, try every code and keep the one of least objective."""
    rows, columns = target.shape
    size = columns // scales.shape[1]
    metric, codes = whole_metric(hessian, outputs, rows), codes.clone()
    for column in range(columns):
        if hessian[column, column] == 0:
            continue  # no code is better than another
        for row in range(rows):
            tried = codes.double().repeat(2**bits, 1, 1)
            tried[:, row, column] = torch.arange(2**bits).double()
            errors = torch.stack([values_of(one, scales, zeros, size) - target for one in tried]).reshape(2**bits, -1)
            codes[row, column] = int(((errors @ metric) * errors).sum(1).argmin())
    return codes


@dataclass(frozen=True)
class SlowSolution:
    """What a method should choose, columns in their original places."""

    codes: Tensor
    """[out, in] int64."""
    scales: Tensor
    """[out, groups] float64."""
    zeros: Tensor
    g_idx: Tensor
    """[in] int64."""


def solve_slowly(layer: Layer, config: QuantizeConfig, side: int | None = None) -> SlowSolution:
    """A whole method on one linear, part after part."""
    recipe, moments = config.recipe, layer.moments(side)
    columns = layer.weight.shape[1]
    size = columns if config.group_size == -1 else config.group_size
    target = target_by_least_squares(
        layer,
        strength=recipe.strength if recipe.base == "qep" else 0.0,
        residual=recipe.residual,
        damp_percent=config.damp_percent,
    )
    outputs = None
    if recipe.output and moments.outputs is not None:
        outputs = moments.outputs.clone()
        for number, block in enumerate(outputs):
            mean = float(block.diagonal().mean())
            outputs[number] = block / mean if mean else torch.eye(len(block)).double()
            outputs[number].diagonal().add_(OUTPUT_DAMP)
    found = gptq_slowly(
        target,
        moments.inputs,
        bits=config.bits,
        size=size,
        sym=config.sym,
        desc_act=config.desc_act,
        static_groups=config.static_groups,
        group_aware=config.group_aware,
        pivot=config.order == "pivot",
        clip_search=config.clip,
        signed=recipe.signed,
        damp_percent=config.damp_percent,
        mismatch=moments.mismatch if recipe.base == "gptaq" else None,
        strength=recipe.strength,
        outputs=outputs,
    )
    grids = [found.grids[group] for group in range(columns // size)]
    scales, zeros = torch.stack([g.scale for g in grids], 1), torch.stack([g.zero for g in grids], 1)
    g_idx, codes = torch.tensor(found.group_of), found.codes
    if recipe.refine:
        places = torch.argsort(g_idx, stable=True)
        hessian = damped_hessian(moments.inputs, config.damp_percent)
        dead = moments.inputs.diagonal() == 0
        hessian[dead, dead] = 0
        hessian, sorted_target, sorted_codes = hessian[places][:, places], target[:, places], codes[:, places]
        for _ in range(recipe.refine):
            scales = refit_slowly(sorted_target, sorted_codes, scales, zeros, hessian, outputs)
            sorted_codes = descend_slowly(sorted_target, sorted_codes, scales, zeros, hessian, outputs, config.bits)
        codes = torch.empty_like(sorted_codes)
        codes[:, places] = sorted_codes
    return SlowSolution(codes, scales, zeros, g_idx)
