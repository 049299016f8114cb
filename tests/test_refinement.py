"""Refined codes must be those that trying every code with the whole objective finds, and must never be worse."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant import _native, refinement, telling
from qquant.affine import quantize, search_qparams
from qquant.config import QuantizeConfig
from qquant.refinement import OUTPUT_DAMP, RowRounder, balanced, block_side, damped, descend, refine, refit_scales
from qquant.solver import solve
from tests import method_reference
from tests.method_reference import (
    best_scales,
    descend_slowly,
    make_layer,
    objective,
    refit_slowly,
    values_of,
    whole_metric,
)
from tests.reference import row_turns

Problem = dict[str, Any]


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both who may move codes: the compiled module, and torch where there is none."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "descent", lambda: None)
    elif _native.descent() is None:
        pytest.skip("qquant._descent is not built")


def problem(
    *, rows: int = 6, columns: int = 48, size: int = 16, bits: int = 4, sym: bool = True, side: int = 0, seed: int = 0
) -> Problem:
    """Rounded weights to refine: ``refine``'s arguments in float64. ``side``: outputs weighted together, 0 for none."""
    layer = make_layer(rows, columns, seed)
    moments = layer.moments(side or None)
    grouped = layer.weight.reshape(-1, size)
    scale, zero = search_qparams(grouped, bits=bits, sym=sym, clip_search="off", hessian=None)
    codes = quantize(grouped, scale[:, None], zero[:, None], bits).to(torch.uint8).reshape(rows, columns)
    assert moments.outputs is not None
    return {
        "target": layer.weight,
        "codes": codes,
        "scales": scale.reshape(rows, -1),
        "zeros": zero.reshape(rows, -1),
        "hessian": damped(moments.inputs, 0.01),
        "outputs": balanced(moments.outputs) if side else None,
    }


def loss(given: Problem, codes: Tensor, scales: Tensor) -> float:
    size = codes.shape[1] // scales.shape[1]
    metric = whole_metric(given["hessian"], given["outputs"], codes.shape[0])
    return objective(given["target"], values_of(codes, scales.double(), given["zeros"], size), metric)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("side", [0, 2, 6])
@pytest.mark.usefixtures("engine")
def test_descent_finds_what_trying_every_code_finds(bits: int, sym: bool, side: int) -> None:
    given = problem(bits=bits, sym=sym, side=side, columns=32)
    expected = descend_slowly(**given, bits=bits)
    codes = given["codes"].clone()
    moved = descend(**{**given, "codes": codes}, bits=bits)
    assert torch.equal(codes.long(), expected.long())
    assert moved == int((codes != given["codes"]).sum()) > 0


def test_descent_of_8_bits_finds_what_trying_every_code_finds() -> None:
    given = problem(bits=8, rows=3, columns=16, side=3)
    codes = given["codes"].clone()
    descend(**{**given, "codes": codes}, bits=8)
    assert torch.equal(codes.long(), descend_slowly(**given, bits=8).long())


@pytest.mark.usefixtures("engine")
def test_codes_at_the_ends_of_the_grid_stay_on_it() -> None:
    """Targets far outside pull every code to one end."""
    for factor, end in ((100.0, 15), (-100.0, 0)):
        given = problem(columns=16)
        given["target"] = torch.full_like(given["target"], factor)
        given["hessian"] = torch.eye(16).double()
        codes = given["codes"].clone()
        descend(**{**given, "codes": codes}, bits=4)
        assert (codes == end).all()


@pytest.mark.usefixtures("engine")
def test_negative_scales_turn_the_step_round() -> None:
    given = problem(columns=32, side=3)
    mirrored = {**given, "scales": -given["scales"], "codes": 16 - given["codes"].clamp(1, 15)}
    codes = mirrored["codes"].clone()
    descend(**{**mirrored, "codes": codes}, bits=4)
    assert torch.equal(codes.long(), descend_slowly(**mirrored, bits=4).long())


@pytest.mark.parametrize("seed", range(5))
def test_refitted_scales_are_the_least_squares_ones_row_by_row(seed: int) -> None:
    """Three steps of conjugate gradients solve three unknowns per row exactly, so only float16 is left."""
    given = problem(seed=seed)
    found = refit_scales(**given)
    assert torch.equal(found, refit_slowly(**given))
    assert torch.equal(found, found.half().double())
    free = best_scales(given["target"], given["codes"], given["zeros"], whole_metric(given["hessian"], None, 6), 16)
    changed = (found != given["scales"]).any(1)
    assert changed.any()
    # Half of float16's step, relative 2^-11.
    torch.testing.assert_close(found[changed], free[changed], rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("side", [2, 6, 12])
def test_refitted_scales_come_as_close_to_least_squares_as_conjugate_gradients_do(side: int) -> None:
    """The bound of k steps with condition number c, (2 ((c^.5 - 1) / (c^.5 + 1))^k)^2 of what was to gain, and float16.

    In the norm of the quadratic, rounding adds at most (largest eigenvalue)^.5 times the rounding's length.
    """
    given = problem(rows=12, side=side)
    found = refit_scales(**given)
    metric = whole_metric(given["hessian"], given["outputs"], 12)
    exact = best_scales(given["target"], given["codes"], given["zeros"], metric, 16)
    steps = given["codes"].double() - given["zeros"].repeat_interleave(16, 1)
    spread = torch.zeros(12, 48, 12, 3).double()
    for row in range(12):
        for column in range(48):
            spread[row, column, row, column // 16] = steps[row, column]
    design = spread.reshape(12 * 48, -1)
    quadratic = design.T @ metric @ design
    root = quadratic.diagonal().rsqrt()
    eigenvalues = torch.linalg.eigvalsh(root[:, None] * quadratic * root)
    condition = float(eigenvalues[-1] / eigenvalues[0]) ** 0.5
    share = 2 * ((condition - 1) / (condition + 1)) ** refinement._CONJUGATE_STEPS
    least, before = loss(given, given["codes"], exact), loss(given, given["codes"], given["scales"])
    rounding = float(torch.linalg.eigvalsh(quadratic)[-1]) ** 0.5 * float((exact * 2.0**-11).norm()) * 1.01
    gap = loss(given, given["codes"], found) - least
    assert gap**0.5 <= share * (before - least) ** 0.5 + rounding
    assert loss(given, given["codes"], found) < before


def test_scales_that_would_leave_their_range_stay() -> None:
    given = problem(seed=3)
    far = {**given, "scales": given["scales"] * 8}
    assert torch.equal(refit_scales(**far), far["scales"])
    assert torch.equal(refit_slowly(**far), far["scales"])


def test_scales_stay_where_rounding_would_make_them_worse() -> None:
    """Each scale is rounded to float16 by itself; a neighbour of what that gives may be better, and then is kept."""
    kept = 0
    for seed in range(8):
        given = problem(seed=seed)
        found = refit_scales(**given)
        best = found.clone()
        ulp = 2.0 ** (found.log2().floor() - 10)
        for shift in itertools.product((-1, 0, 1), repeat=3):
            tried = found + torch.tensor(shift).double() * ulp
            for row in range(6):
                part = slice(row, row + 1)
                one = {**given, "target": given["target"][part], "zeros": given["zeros"][part]}
                if loss(one, given["codes"][part], tried[part]) < loss(one, given["codes"][part], best[part]):
                    best[row] = tried[row]
        better = (best != found).any(1)
        kept += int(better.sum())
        assert torch.equal(refit_scales(**{**given, "scales": best})[better], best[better])
    assert kept


def test_a_group_whose_codes_all_stand_for_zero_keeps_its_scale() -> None:
    given = problem()
    given["codes"][:, 16:32] = 8
    found = refit_scales(**given)
    assert torch.equal(found[:, 1], given["scales"][:, 1])
    assert torch.equal(found, refit_slowly(**given))


@pytest.mark.parametrize("side", [0, 3, 6])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_objective_never_grows(side: int, bits: int, dtype: torch.dtype) -> None:
    given = problem(bits=bits, side=side, seed=7)
    narrow = {name: part if part is None or name == "codes" else part.to(dtype) for name, part in given.items()}
    losses = [loss(given, given["codes"], given["scales"])]
    codes, scales = given["codes"].clone(), narrow["scales"]
    for _ in range(4):
        scales = refit_scales(**{**narrow, "codes": codes, "scales": scales})
        losses.append(loss(given, codes, scales))
        descend(**{**narrow, "codes": codes, "scales": scales}, bits=bits)
        losses.append(loss(given, codes, scales))
    # What float32 cannot tell apart: its 48 * 48 sums of products, far below any step's gain.
    slack = 0.0 if dtype == torch.float64 else 1e-5
    assert all(later <= earlier * (1 + slack + 1e-12) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    together = refine(**narrow, bits=bits, passes=4)
    assert torch.equal(together[0], codes)
    assert torch.equal(together[1], scales)


@pytest.mark.parametrize("side", [0, 4, 8])
@pytest.mark.usefixtures("engine")
def test_codes_that_cannot_be_bettered_do_not_move_again(side: int) -> None:
    given = problem(rows=8, side=side)
    codes, moves = given["codes"].clone(), [1]
    while moves[-1] and len(moves) < 50:
        moves.append(descend(**{**given, "codes": codes}, bits=4))
    assert moves[-1] == 0


@pytest.mark.parametrize("side", [0, 4])
@pytest.mark.usefixtures("engine")
def test_refinement_does_not_depend_on_the_block_size(side: int) -> None:
    given = problem(rows=8, columns=96, side=side)
    expected = refine(**given, bits=4, passes=2)
    for block_size in (1, 7, 32, 96, 1000):
        codes, scales = refine(**given, bits=4, passes=2, block_size=block_size)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("side", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_refinement_does_not_depend_on_threads(side: int, dtype: torch.dtype) -> None:
    given = problem(rows=144, columns=32, side=side)
    narrow = {name: part if part is None or name == "codes" else part.to(dtype) for name, part in given.items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(refine(**narrow, bits=4, passes=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.usefixtures("engine")
def test_without_outputs_rows_do_not_see_one_another() -> None:
    given = problem(rows=300, columns=32)
    codes, _ = refine(**given, bits=4, passes=1)
    part = slice(130, 131)
    alone = {**given, **{name: given[name][part] for name in ("target", "codes", "scales", "zeros")}}
    assert torch.equal(refine(**alone, bits=4, passes=1)[0], codes[part])


def test_equal_outputs_count_like_none() -> None:
    given = problem()
    same = {**given, "outputs": torch.eye(6).double()[None]}
    codes, other = given["codes"].clone(), given["codes"].clone()
    descend(**{**given, "codes": codes}, bits=4)
    descend(**{**same, "codes": other}, bits=4)
    assert torch.equal(codes, other)


def test_refine_leaves_its_arguments_alone() -> None:
    given = problem(rows=1, columns=16, side=1)
    before = {name: None if part is None else part.clone() for name, part in given.items()}
    refine(**given, bits=4, passes=2)
    for name, part in before.items():
        assert part is None or torch.equal(part, given[name])


@pytest.mark.parametrize("outputs", [1, 64, 128, 130, 192, 257, 1000, 4096])
def test_outputs_are_weighted_in_the_largest_blocks_that_divide_them(outputs: int) -> None:
    divisors = [side for side in range(1, refinement._SIDE + 1) if outputs % side == 0]
    assert block_side(outputs) == divisors[-1]


@pytest.mark.parametrize("side", [3, 6])
@pytest.mark.usefixtures("engine")
def test_rows_make_up_for_one_another_as_columns_do_in_gptq(side: int) -> None:
    """One column of weights is one row of a matrix whose Hessian is O: act-order, and the same grid everywhere."""
    given = problem(rows=6, columns=16, side=side)
    column, scale, zero = given["target"][:, 3], given["scales"][:, 0], given["zeros"][:, 0]
    found = RowRounder(given["outputs"], torch.float64).round(column, scale, zero, 4)
    meant = column.clone()
    for row, others in row_turns(column, given["outputs"]):
        code = (meant[row] / scale[row]).round().add(zero[row]).clamp(0, 15)
        assert int(found[row]) == int(code)
        meant -= (meant[row] - scale[row] * (code - zero[row])) * others


def test_the_damping_of_outputs_is_the_references() -> None:
    assert OUTPUT_DAMP == method_reference.OUTPUT_DAMP
    blocks = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    assert torch.equal(damped(blocks, 0.5).diagonal(dim1=1, dim2=2), torch.tensor([[2.0, 2.0], [4.0, 4.0]]))


def test_each_block_of_outputs_counts_by_itself_and_one_of_zeros_like_none() -> None:
    """However small a block's gradients are: 1e-30 squared would be 0 in float32."""
    blocks = torch.tensor([[[1.0, 0.5], [0.5, 3.0]]] * 3)
    blocks[1] *= 1e-30
    blocks[2] = 0
    found = balanced(blocks)
    expected = torch.tensor([[0.55, 0.25], [0.25, 1.55]])
    torch.testing.assert_close(found[:2], expected.expand(2, 2, 2), rtol=1e-6, atol=0)
    assert torch.equal(found[2], 1.05 * torch.eye(2))


@pytest.mark.parametrize("changed", [0, 1])
def test_blocks_of_outputs_do_not_see_one_another(changed: int) -> None:
    given = problem(rows=12, side=6)
    codes, scales = refine(**given, bits=4, passes=2)
    other = {**given, "target": given["target"].clone(), "outputs": given["outputs"].clone()}
    other["target"][6 * changed : 6 * changed + 6] *= 1.3
    other["outputs"][changed] *= 7
    again, refitted = refine(**other, bits=4, passes=2)
    kept = slice(6, 12) if changed == 0 else slice(0, 6)
    assert torch.equal(again[kept], codes[kept])
    assert torch.equal(refitted[kept], scales[kept])


@pytest.mark.parametrize("method", ["refine", "best"])
def test_without_the_compiled_module_the_codes_are_the_same_and_it_is_said(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, config = make_layer(rows=12), QuantizeConfig(method=method, group_size=16)
    expected = solve(layer.weight, layer.moments(side=4), config)
    monkeypatch.setattr(_native, "descent", lambda: None)
    monkeypatch.setattr(telling, "said", set())
    found = solve(layer.weight, layer.moments(side=4), config)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert caplog.text.count("qquant._descent is not here") == 1


def test_the_switch_for_compiled_modules_takes_this_one_away() -> None:
    code = "from qquant import _native; assert _native.descent() is None; print(_native._load('qquant._descent')[1])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"QQUANT_NATIVE": "0", "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "switched off by QQUANT_NATIVE=0\n"
