"""Numbers that lie, put into a linear's weight, Hessian, other moments or activations: NaN, Inf, denormals, zeros,
numbers too large for a float16 scale, dead and rank-deficient inputs, Hessians that are indefinite or damaged. What
comes of it is a NumericError, or a result whose fallback is recorded, or a sane one; never a bad scale.

Whole checkpoints with such numbers are in test_bad_numbers_in_models.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.affine import choose_qparams, dequantize, quantize
from qquant.columns import impossible_columns
from qquant.config import Bits, QuantizeConfig
from qquant.errors import NumericError
from qquant.moments import Hessian, Moments
from qquant.refinement import balanced
from qquant.solver import Solution, relative_error, solve
from tests.method_reference import make_layer

ROW, BESIDES = "bad numbers", ("method", "dtype", "bits", "sym", "options")
ROWS, COLUMNS, GROUP = 16, 64, 16
LARGEST = float(torch.finfo(torch.float32).max)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
METHODS = ("rtn", "gptq", "best")
PIVOT = "qep+pivot+refine"

Outcome = Callable[..., None]


@cache
def layer(dead: tuple[int, ...] = ()) -> tuple[Tensor, Moments]:
    """A weight and all moments, float64; read, never written."""
    found = make_layer(ROWS, COLUMNS, seed=1, dead=dead)
    return found.weight, found.moments(side=8)


def config_of(method: str, **options: Any) -> QuantizeConfig:
    return QuantizeConfig(method=method, group_size=GROUP, **options)


def in_dtype(moments: Moments, dtype: torch.dtype) -> Moments:
    parts = (moments.inputs, moments.mismatch, moments.residual, moments.outputs)
    return Moments(*(None if part is None else part.to(dtype) for part in parts))  # type: ignore[arg-type]


def with_inputs(hessian: Tensor) -> Moments:
    return replace(layer()[1], inputs=hessian)


def energy_of(error: Tensor, hessian: Tensor, outputs: Tensor | None) -> Tensor:
    """trace(O E H E^T) in float64, by its definition."""
    metric = torch.eye(ROWS).double() if outputs is None else torch.block_diag(*balanced(outputs))
    return torch.trace(metric @ error @ hessian @ error.T)


def assert_sane(weight: Tensor, solution: Solution, moments: Moments | None, config: QuantizeConfig) -> None:
    """The error is below what it would be if every column missed by a whole step of its row's coarsest group.

    GPTQ leaves sum_j d_j r_j^2, r_j what column j is rounded by and d_j its pivot, and pivots are at most the diagonal;
    rounding leaves half a step at most, what earlier columns push over the edge of a grid another half.
    """
    aim = (weight if solution.target is None else solution.target).double()
    used = solution.whole_hessian and moments is not None and config.needs_data
    hessian = moments.inputs.double() if used and moments is not None else torch.eye(COLUMNS).double()
    live = hessian.diagonal() > 0
    damp = solution.damp_percent * (hessian.diagonal()[live].mean() if live.any() else 1.0)
    hessian = hessian + damp * torch.eye(COLUMNS).double()
    outputs = (
        moments.outputs.double() if used and config.recipe.output and moments and moments.outputs is not None else None
    )
    steps = 2 * aim.abs().amax(1)[:, None] / (2**config.bits - 1) + 2.0**-24
    worth = torch.ones(ROWS).double() if outputs is None else torch.cat([part.diagonal() for part in balanced(outputs)])
    most = (worth[:, None] * steps * steps * hessian.diagonal()).sum()
    assert energy_of(solution.weight().double() - aim, hessian, outputs) <= most


def judged(
    weight: Tensor, moments: Moments | None, config: QuantizeConfig, outcome: Outcome
) -> Solution | NumericError:
    """What came of it, once everything that must hold does."""
    before = weight.clone(), None if moments is None else moments.inputs.clone()
    refusal: NumericError | None = None
    try:
        found = solve(weight, moments, config)
    except NumericError as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 500
        outcome("refused")
        return refusal
    assert torch.equal(weight, before[0])
    assert before[1] is None or moments is None or torch.equal(moments.inputs, before[1])
    assert found.scales.isfinite().all()
    assert (found.scales != 0).all()
    assert torch.equal(found.scales.half().float(), found.scales)
    assert found.zeros.isfinite().all()
    assert 0 <= int(found.codes.min()) <= int(found.codes.max()) <= 2**config.bits - 1
    assert found.weight().isfinite().all()
    if config.recipe.base != "gptaq":  # what it aims at changes from column to column
        assert_sane(weight, found, moments, config)
    measured = relative_error(weight, found, None if moments is None else moments.inputs)
    assert math.isfinite(measured)
    assert measured >= 0
    outcome("sane" if found.fallback is None else "recorded fallback")
    if found.fallback is not None:
        with pytest.raises(NumericError, match="--strict forbids"):
            solve(weight, moments, config.model_copy(update={"strict": True}))
    return found


def refused(weight: Tensor, moments: Moments | None, config: QuantizeConfig, outcome: Outcome, words: str) -> None:
    found = judged(weight, moments, config, outcome)
    assert isinstance(found, NumericError)
    assert words in str(found)


def spoiled(matrix: Tensor, place: str, value: float) -> Tensor:
    found = matrix.clone()
    if place == "first":
        found[0, 0] = value
    elif place == "last":
        found[-1, -1] = value
    elif place == "row":
        found[7] = value
    elif place == "column":
        found[:, 33] = value
    else:
        found[...] = value
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["first", "last", "row", "column", "all"])
@pytest.mark.parametrize("value", list(NOT_FINITE))
def test_a_weight_that_is_not_finite_is_refused(value: str, place: str, method: str, outcome: Outcome) -> None:
    weight, moments = layer()
    bad = spoiled(weight.float(), place, NOT_FINITE[value])
    refused(bad, in_dtype(moments, torch.float32), config_of(method), outcome, "weights must be finite")


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["last", "row", "all"])
@pytest.mark.parametrize("value", [2e6, -2e6, 1e30, LARGEST, -LARGEST])
def test_weights_too_large_for_a_float16_scale_are_refused(
    value: float, place: str, method: str, sym: bool, outcome: Outcome
) -> None:
    weight, moments = layer()
    bad = spoiled(weight.float(), place, value)
    refused(bad, in_dtype(moments, torch.float32), config_of(method, sym=sym), outcome, "float16")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq+clip-off", "gptq+desc", "best"])
@pytest.mark.parametrize("kind", ["one outlier", "all"])
def test_the_largest_weights_that_fit_are_quantized_or_refused(
    kind: str, method: str, bits: Bits, outcome: Outcome
) -> None:
    """What makes up for earlier columns may push them over the edge; then it is refused."""
    weight, moments = layer()
    most = 65504 * (2 ** (bits - 1) - 0.5) * 0.999
    bad = (
        spoiled(weight.float(), "last", most) if kind == "one outlier" else (weight / weight.abs().max() * most).float()
    )
    options: dict[str, Any] = {"desc_act": True} if method == "gptq+desc" else {}
    config = config_of(method.removesuffix("+desc"), bits=bits, **options)
    found = judged(bad, in_dtype(moments, torch.float32), config, outcome)
    if method == "rtn":
        assert isinstance(found, Solution)
    elif isinstance(found, NumericError):
        assert "float16" in str(found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rtn+clip-off", "gptq", PIVOT, "best"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 2.0**-26, 2.0**-23, 2.0**-20, 2.0**-17, 2.0**-14])
def test_tiny_weights_miss_by_a_step_at_most(size: float, method: str, bits: Bits, outcome: Outcome) -> None:
    """Float16 scales lie 2**-24 apart there, and none is smaller."""
    weight, moments = layer()
    tiny = (weight / weight.abs().max() * size).float()
    found = judged(tiny, in_dtype(moments, torch.float32), config_of(method, bits=bits), outcome)
    assert isinstance(found, Solution)
    assert found.fallback is None
    if method == "rtn+clip-off":
        steps = found.scales[:, found.g_idx.long()]
        assert ((found.weight() - tiny).abs() <= steps).all()


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "gptq+signed", "gptq+refine"])
@pytest.mark.parametrize("place", ["row", "group", "column", "all"])
def test_zeros_stay_zero(place: str, method: str, sym: bool, outcome: Outcome) -> None:
    weight, moments = layer()
    zeros = weight.float().clone()
    where = {"row": (7,), "group": (7, slice(16, 32)), "column": (slice(None), 33), "all": (...,)}[place]
    zeros[where] = 0
    found = judged(zeros, in_dtype(moments, torch.float32), config_of(method, sym=sym), outcome)
    assert isinstance(found, Solution)
    assert found.fallback is None
    if method == "rtn" or place in ("row", "all"):  # elsewhere it makes up for other columns
        assert (found.weight()[where] == 0).all()


@pytest.mark.parametrize("method", ["gptq", PIVOT, "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("place", ["diagonal", "pair", "above", "below"])
@pytest.mark.parametrize("value", list(NOT_FINITE))
def test_a_hessian_that_is_not_finite_is_refused_wherever_it_is(
    value: str, place: str, dtype: torch.dtype, method: str, outcome: Outcome
) -> None:
    weight, moments = layer()
    hessian = moments.inputs.clone()
    for row, column in {"diagonal": [(5, 5)], "pair": [(3, 60), (60, 3)], "above": [(3, 60)], "below": [(60, 3)]}[
        place
    ]:
        hessian[row, column] = NOT_FINITE[value]
    bad = in_dtype(with_inputs(hessian), dtype)
    refused(weight.float(), bad, config_of(method), outcome, "a Hessian must be finite")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"static_groups": True}], ids=["", "desc_act", "static"])
@pytest.mark.parametrize("method", ["gptq", "gptaq", PIVOT, "best"])
@pytest.mark.parametrize("dead", [1, GROUP, COLUMNS // 2, COLUMNS - 1, COLUMNS])
def test_dead_columns_are_counted_and_harmless(
    dead: int, method: str, options: dict[str, bool], bits: Bits, outcome: Outcome
) -> None:
    weight, moments = layer(tuple(range(dead)))
    config = config_of(method, bits=bits, **options)
    found = judged(weight.float(), in_dtype(moments, torch.float32), config, outcome)
    assert isinstance(found, Solution)
    assert found.fallback is None
    assert found.dead_columns == dead


@pytest.mark.parametrize("method", ["gptq", "gptaq", PIVOT, "best"])
@pytest.mark.parametrize("power", [-40, -34, -28, -14, 0, 10, 16, 24, 34])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_few_directions_at_any_size_are_enough(rank: int, power: int, method: str, outcome: Outcome) -> None:
    """Mean squares of inputs that float32 cannot solve with are left alone, and that is recorded."""
    weight, _ = layer()
    draw = torch.Generator().manual_seed(rank)
    inputs = torch.randn(128, rank, generator=draw).double() @ torch.randn(rank, COLUMNS, generator=draw).double()
    hessian = inputs.T @ inputs / 128 * 10.0**power
    moments = replace(with_inputs(hessian), mismatch=0.1 * hessian, residual=None)
    found = judged(weight.float(), in_dtype(moments, torch.float32), config_of(method), outcome)
    assert isinstance(found, Solution)
    if -28 <= power <= 16:
        assert found.fallback is None
    else:
        assert found.fallback is not None
        assert "rounded to nearest: its inputs' mean squares" in found.fallback
        signed = "+signed" if config_of(method).recipe.signed else ""
        nearest = solve(weight.float(), None, config_of(f"rtn+clip-weight{signed}"))
        assert torch.equal(found.weight(), nearest.weight())


@pytest.mark.parametrize("method", ["gptq", PIVOT, "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("power", range(-12, 4))
def test_an_indefinite_hessian_is_damped_or_refused(
    power: int, dtype: torch.dtype, method: str, outcome: Outcome
) -> None:
    """Its least eigenvalue is -10**power mean diagonals; the largest damping adds ten."""
    weight, moments = layer()
    mean = float(moments.inputs.diagonal().mean())
    values, vectors = torch.linalg.eigh(moments.inputs)
    values[0] = -(10.0**power) * mean
    hessian = vectors @ torch.diag(values) @ vectors.T
    bad = in_dtype(with_inputs((hessian + hessian.T) / 2), dtype)
    found = judged(weight.float(), bad, config_of(method), outcome)
    if power >= 2:
        assert isinstance(found, NumericError)
        assert "on its diagonal, where mean squares stand" in str(found)
        return
    assert isinstance(found, Solution)
    if power == 1:  # as much as the mean was before this took its share
        assert found.fallback is not None
        return
    assert found.damp_escalations == max(0, power + 3)
    assert (found.fallback is None) == (found.damp_escalations == 0)
    assert found.fallback is None or found.fallback.startswith("damping raised from 0.01 to ")


@pytest.mark.parametrize("method", ["gptq", "gptaq", PIVOT, "best"])
@pytest.mark.parametrize("kind", ["pair", "two pairs", "row", "dead", "slightly negative"])
def test_columns_with_impossible_entries_are_left_out(kind: str, method: str, outcome: Outcome) -> None:
    weight, moments = layer()
    hessian = moments.inputs.clone()
    most, out = float(hessian.diagonal().max()), {9}
    if kind == "row":
        hessian[9, :] = hessian[:, 9] = 30 * most
    elif kind == "dead":
        hessian[9, :] = hessian[:, 9] = torch.where(torch.arange(COLUMNS) == 9, 0.0, 0.1 * most)
    elif kind == "slightly negative":
        hessian[9, :] = hessian[:, 9] = torch.where(torch.arange(COLUMNS) == 9, -0.1 * most, 10 * most)
    else:
        pairs = [(9, 50)] if kind == "pair" else [(9, 50), (20, 21)]
        out = {column for pair in pairs for column in pair}
        for row, column in pairs:
            hessian[row, column] = hessian[column, row] = 100 * most
    assert set(impossible_columns(hessian).nonzero()[:, 0].tolist()) <= out
    found = judged(weight.float(), in_dtype(with_inputs(hessian), torch.float32), config_of(method), outcome)
    assert isinstance(found, Solution)
    assert found.fallback is not None
    assert f"of {COLUMNS} input columns rounded to nearest" in found.fallback
    assert found.dead_columns == len(out) / (2 if "pair" in kind else 1)


def test_impossible_columns_are_few_and_sound_hessians_have_none() -> None:
    for seed in range(8):
        hessian = make_layer(ROWS, COLUMNS, seed=seed).moments().inputs
        assert not impossible_columns(hessian).any()
        assert not impossible_columns(hessian.float()).any()
        assert not impossible_columns(torch.zeros(8, 8)).any()
    assert impossible_columns(-torch.eye(8)).all()
    assert int(impossible_columns(torch.full((8, 8), 10.0).fill_diagonal_(1.0)).sum()) == 7


@pytest.mark.parametrize("method", ["gptq", "best"])
@pytest.mark.parametrize("share", [0.5, 2.0, 8.0])
def test_what_damping_and_leaving_columns_out_do_not_mend_is_rounded_to_nearest(
    share: float, method: str, outcome: Outcome
) -> None:
    """No entry is impossible by itself: all inputs are opposed to one another, which more than two cannot be."""
    weight, _ = layer()
    hessian = torch.full((COLUMNS, COLUMNS), -share / 8).double().fill_diagonal_(1.0)
    found = judged(weight.float(), in_dtype(with_inputs(hessian), torch.float32), config_of(method), outcome)
    least = 1 - (COLUMNS - 1) * share / 8  # its least eigenvalue, of a mean diagonal of 1
    assert isinstance(found, Solution)
    assert found.fallback is not None
    assert found.fallback.startswith("damping raised" if least > -10 else "")
    assert "Hessian" in found.fallback or least > -10


@pytest.mark.parametrize("value", list(NOT_FINITE))
@pytest.mark.parametrize(("part", "words"), [
    ("mismatch", "the mismatch of a linear's inputs"),
    ("residual", "weights corrected for earlier errors must be finite"),
    ("outputs", "moments of a linear's outputs must be finite"),
])  # fmt: skip
def test_other_moments_that_are_not_finite_are_refused(part: str, words: str, value: str, outcome: Outcome) -> None:
    weight, moments = layer()
    bad = getattr(moments, part).clone()
    bad[..., -1, -1] = NOT_FINITE[value]
    refused(weight.float(), in_dtype(replace(moments, **{part: bad}), torch.float32), config_of("best"), outcome, words)


@pytest.mark.parametrize("part", ["mismatch", "residual"])
@pytest.mark.parametrize("method", ["best", "gptaq", PIVOT])
@pytest.mark.parametrize("factor", [1e4, 1e12, 1e30, LARGEST])
def test_what_corrects_weights_without_bound_is_refused_or_sane(
    factor: float, method: str, part: str, outcome: Outcome
) -> None:
    weight, moments = layer()
    bad = (getattr(moments, part) / getattr(moments, part).abs().max() * factor).float()
    found = judged(weight.float(), replace(in_dtype(moments, torch.float32), **{part: bad}), config_of(method), outcome)
    uses = part == "mismatch" or method == "best"
    assert isinstance(found, NumericError) or factor == 1e4 or not uses
    assert isinstance(found, Solution) or "what makes up for other errors" in str(found)


@pytest.mark.parametrize("kind", ["negative", "indefinite", "huge"])
def test_moments_of_outputs_that_are_none_are_refused(kind: str, outcome: Outcome) -> None:
    weight, moments = layer()
    assert moments.outputs is not None
    bad = in_dtype(moments, torch.float32)
    outputs = moments.outputs.float().clone()
    if kind == "negative":
        outputs[1, 2, 2] *= -1
    elif kind == "indefinite":
        outputs[1, 2, 3] = outputs[1, 3, 2] = 3 * outputs[1].diagonal().max()
    else:
        outputs[1] = outputs[1] / outputs[1].diagonal().max() * LARGEST
    refused(weight.float(), replace(bad, outputs=outputs), config_of("best"), outcome, "moments of a linear's outputs")


@pytest.mark.parametrize("kind", ["zero", "denormal"])
def test_outputs_that_nothing_feels_count_alike(kind: str, outcome: Outcome) -> None:
    weight, moments = layer()
    assert moments.outputs is not None
    outputs = moments.outputs * (0.0 if kind == "zero" else 1e-42)
    found = judged(
        weight.float(), in_dtype(replace(moments, outputs=outputs), torch.float32), config_of("best"), outcome
    )
    assert isinstance(found, Solution)
    assert found.fallback is None


@pytest.mark.parametrize("place", [0, 40, COLUMNS - 1])
@pytest.mark.parametrize("value", [*NOT_FINITE.values(), 1e20, -LARGEST], ids=[*NOT_FINITE, "1e20", "largest"])
def test_inputs_whose_squares_are_not_finite_never_become_a_hessian(value: float, place: int, outcome: Outcome) -> None:
    sums = Hessian(COLUMNS)
    inputs = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    inputs[3, place] = value
    sums.add(inputs)
    with pytest.raises(NumericError, match="activations must be finite"):
        sums.finish()
    outcome("refused")


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-22, 1e-18])
def test_inputs_whose_squares_underflow_are_dead_or_few(size: float, outcome: Outcome) -> None:
    """Their products with other inputs do not underflow; that alone makes them neither alive nor impossible."""
    sums = Hessian(COLUMNS)
    inputs = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
    inputs[:, 9] *= size
    sums.add(inputs)
    found = judged(layer()[0].float(), Moments(sums.finish()), config_of("gptq"), outcome)
    assert isinstance(found, Solution)
    assert found.fallback is None
    assert found.dead_columns == (1 if size < 1e-22 else 0)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_finite_group_gets_a_bad_grid(bits: Bits, sym: bool, outcome: Outcome) -> None:
    """Over all magnitudes of float32: a grid that misses nothing by more than a step, or one clear error."""
    draw = torch.Generator().manual_seed(bits)
    for power in range(-149, 128, 3):
        group = torch.ldexp(torch.randn(32, GROUP, generator=draw).clamp(-1.9, 1.9), torch.tensor(power))
        for signed in (False, True):
            try:
                scale, zero = choose_qparams(group, bits=bits, sym=sym, signed=signed)
            except NumericError:
                assert power >= 14
                outcome("refused")
                continue
            assert (scale != 0).all()
            assert scale.isfinite().all()
            found = dequantize(quantize(group, scale[:, None], zero[:, None], bits), scale[:, None], zero[:, None])
            # Signed grids may clip a value as large on the other side by a step more; the rest is float16's rounding.
            assert ((found - group).abs() <= (2 if signed or not sym else 1.001) * scale.abs()[:, None]).all()
            outcome("sane")
