"""The fast solver must choose what the slow one-column-at-a-time reference chooses, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qquant import _native
from qquant.config import Bits, QuantizeConfig
from qquant.errors import NumericError, UsageError
from qquant.factor import factor_rows, inverse_factor
from qquant.moments import Hessian
from qquant.solver import Solution, relative_error, solve
from tests.reference import gptq_one_column_at_a_time

ROWS, COLUMNS = 6, 96

CASES: dict[str, dict[str, Any]] = {
    "int4 sym g32": {"bits": 4, "group_size": 32},
    "int4 asym g32": {"bits": 4, "group_size": 32, "sym": False},
    "int8 sym g32": {"bits": 8, "group_size": 32},
    "int8 asym row": {"bits": 8, "group_size": -1, "sym": False},
    "int3 sym g16": {"bits": 3, "group_size": 16},
    "int3 asym g96": {"bits": 3, "group_size": 96, "sym": False},
    "int2 asym g16": {"bits": 2, "group_size": 16, "sym": False},
    "int2 sym row": {"bits": 2, "group_size": -1},
    "odd divisor g12": {"bits": 4, "group_size": 12},
    "odd divisor g48": {"bits": 4, "group_size": 48, "sym": False},
    "left to right": {"bits": 4, "group_size": 32, "act_group_aware": False},
    "desc_act": {"bits": 4, "group_size": 32, "desc_act": True},
    "desc_act row": {"bits": 4, "group_size": -1, "desc_act": True},
    "desc_act asym g16": {"bits": 4, "group_size": 16, "desc_act": True, "sym": False},
    "static groups": {"bits": 4, "group_size": 32, "static_groups": True},
    "static act-order": {"bits": 4, "group_size": 32, "desc_act": True, "static_groups": True},
    "static act-order asym": {"bits": 3, "group_size": 16, "desc_act": True, "static_groups": True, "sym": False},
    "group-aware static": {"bits": 4, "group_size": 16, "static_groups": True, "act_group_aware": True},
    "clip by weight": {"bits": 4, "group_size": 32, "clip_search": "weight"},
    "clip by weight asym": {"bits": 3, "group_size": 16, "clip_search": "weight", "sym": False},
    "clip by hessian": {"bits": 4, "group_size": 32, "clip_search": "hessian"},
    "clip by hessian desc_act": {"bits": 3, "group_size": 32, "clip_search": "hessian", "desc_act": True},
    "clip by hessian static": {
        "bits": 4, "group_size": 16, "clip_search": "hessian", "desc_act": True, "static_groups": True
    },
    "more damping": {"bits": 4, "group_size": 32, "damp_percent": 0.1},
}  # fmt: skip


def make_layer(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Hessian of correlated inputs whose channels differ in size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.1
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    channels = torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    inputs = (torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix) * channels
    return weight, inputs.T @ inputs / inputs.shape[0]


def config_of(options: dict[str, Any]) -> QuantizeConfig:
    """The searched clip is slow in the reference, so cases that are not about it switch it off."""
    return QuantizeConfig(**{"method": "gptq", "clip_search": "off", **options})


def reference_options(options: dict[str, Any], columns: int) -> dict[str, Any]:
    config = config_of(options)
    return {
        "bits": config.bits,
        "size": columns if config.group_size == -1 else config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "static_groups": config.static_groups,
        "group_aware": config.group_aware,
        "clip_search": config.clip_search,
        "damp_percent": config.damp_percent,
    }


@pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
def test_solver_equals_the_one_column_at_a_time_reference(options: dict[str, Any]) -> None:
    weight, hessian = make_layer()
    codes, values = gptq_one_column_at_a_time(weight, hessian, **reference_options(options, COLUMNS))
    solution = solve(weight, hessian, config_of(options))
    assert torch.equal(solution.codes.long(), codes)
    torch.testing.assert_close(solution.weight().double(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group_size", [64, 128])
def test_usual_group_sizes_equal_the_reference(group_size: int) -> None:
    weight, hessian = make_layer(rows=2, columns=256)
    options = {"bits": 4, "group_size": group_size, "clip_search": "weight"}
    codes, _ = gptq_one_column_at_a_time(weight, hessian, **reference_options(options, 256))
    assert torch.equal(solve(weight, hessian, config_of(options)).codes.long(), codes)


def test_a_dead_column_does_not_change_the_damping_of_the_others() -> None:
    _, hessian = make_layer()
    small = hessian * 1e-6
    small[7], small[:, 7] = 0, 0
    inverse, damp, _ = inverse_factor(small, torch.arange(COLUMNS), small.diagonal() == 0, 0.01)
    factor = factor_rows(inverse, 0, COLUMNS)
    live = torch.arange(COLUMNS) != 7
    damped = torch.linalg.inv(factor.T @ factor)[live][:, live] - small[live][:, live]
    torch.testing.assert_close(
        damped.diagonal(),
        torch.full_like(damped.diagonal(), damp * float(small.diagonal()[live].mean())),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
def test_result_does_not_depend_on_the_block_size(options: dict[str, Any]) -> None:
    weight, hessian = make_layer(rows=16, columns=384, seed=1)
    config = config_of(options)
    expected = solve(weight, hessian, config, block_size=128)
    for block_size in (8, 32, 100, 512):
        got = solve(weight, hessian, config, block_size=block_size)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)


@pytest.mark.parametrize("seed", range(20))
def test_float32_objective_is_as_good_as_the_float64_one(seed: int) -> None:
    """Float32 may flip a code whose value lies on a rounding tie; the error it leaves must not grow for that."""
    weight, hessian = make_layer(rows=32, columns=128, seed=seed)
    config = QuantizeConfig(method="gptq", bits=4, group_size=32)
    exact = solve(weight, hessian, config)
    fast = solve(weight.float(), hessian.float(), config)
    assert (exact.codes != fast.codes).float().mean() < 0.01
    assert relative_error(weight, fast, hessian) <= relative_error(weight, exact, hessian) * 1.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_leaves_less_error_than_rounding(bits: Bits, sym: bool) -> None:
    weight, hessian = make_layer(rows=32, columns=128)
    gptq = solve(weight, hessian, QuantizeConfig(method="gptq", bits=bits, group_size=32, sym=sym))
    nearest = solve(weight, None, QuantizeConfig(method="rtn", bits=bits, group_size=32, sym=sym))

    def output_error(solution: Solution) -> float:
        error = solution.weight().double() - weight
        return float((error @ hessian * error).sum())

    assert output_error(gptq) < output_error(nearest)


def test_rounding_to_nearest_is_the_same_call_without_data() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    solution = solve(weight, None, QuantizeConfig(method="rtn", bits=8, group_size=32, sym=False))
    error = (solution.weight() - weight).reshape(8, 2, 32).abs().amax(-1)
    # Half a step, and up to 2**-11 of a value (255 steps at most) where the float16 scale was rounded down.
    assert (error <= solution.scales * (0.5 + 255 * 2.0**-11) + 1e-7).all()


def test_every_scale_is_a_float16_value_and_every_zero_fits_v1() -> None:
    weight, hessian = make_layer()
    weight = weight.abs()  # all positive: the asymmetric zero would be 0, which v1 cannot store
    solution = solve(weight, hessian, QuantizeConfig(method="gptq", bits=4, group_size=16, sym=False))
    assert torch.equal(solution.scales.half().float(), solution.scales)
    assert solution.zeros.min() >= 1
    assert solution.zeros.max() <= 15


@pytest.mark.parametrize(("options", "scattered"), [
    ({"desc_act": True}, True),
    ({"desc_act": True, "static_groups": True}, False),
    ({"act_group_aware": True}, False),
    ({}, False),
])  # fmt: skip
def test_only_plain_act_order_needs_g_idx(options: dict[str, Any], scattered: bool) -> None:
    weight, hessian = make_layer()
    config = QuantizeConfig(method="gptq", bits=4, group_size=16, **options)
    g_idx = solve(weight, hessian, config).g_idx
    assert (not torch.equal(g_idx, torch.arange(COLUMNS).int() // 16)) == scattered == config.needs_g_idx
    assert torch.equal(g_idx.bincount(), torch.full((COLUMNS // 16,), 16))


def test_dead_columns_are_rounded_to_nearest_and_counted() -> None:
    weight, hessian = make_layer()
    hessian[5], hessian[:, 5] = 0, 0
    hessian[40], hessian[:, 40] = 0, 0
    solution = solve(weight, hessian, config_of({"group_size": 32}))
    assert solution.dead_columns == 2
    codes, _ = gptq_one_column_at_a_time(weight, hessian, **reference_options({"group_size": 32}, COLUMNS))
    assert torch.equal(solution.codes.long(), codes)
    step = solution.scales[:, 5 // 32].double()
    assert ((solution.weight()[:, 5].double() - weight[:, 5]).abs() <= step).all()


def test_all_dead_layer_is_rounded_to_nearest() -> None:
    weight, _ = make_layer()
    solution = solve(
        weight, torch.zeros(COLUMNS, COLUMNS).double(), QuantizeConfig(method="gptq", bits=4, group_size=32)
    )
    nearest = solve(weight.float(), None, QuantizeConfig(method="rtn", bits=4, group_size=32))
    assert solution.dead_columns == COLUMNS
    assert (solution.codes != nearest.codes).float().mean() < 0.01  # float32 and float64 differ only on ties


def test_damping_is_raised_and_recorded_when_the_hessian_is_indefinite() -> None:
    weight, hessian = make_layer()
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()
    solution = solve(
        weight, vectors @ torch.diag(values) @ vectors.T, QuantizeConfig(method="gptq", bits=4, group_size=32)
    )
    assert solution.damp_escalations == 1
    assert solution.damp_percent == pytest.approx(0.1)


def test_a_hopeless_hessian_is_one_clear_error() -> None:
    weight, hessian = make_layer()
    with pytest.raises(NumericError, match="positive definite"):
        solve(
            weight,
            hessian - 1000 * hessian.diagonal().mean() * torch.eye(COLUMNS),
            QuantizeConfig(method="gptq", group_size=32),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    weight, hessian = make_layer()
    spoiled = weight.clone()
    spoiled[1, 1] = value
    with pytest.raises(NumericError, match="weights must be finite"):
        solve(spoiled, hessian, QuantizeConfig(method="gptq", group_size=32))
    accumulator = Hessian(4)
    accumulator.add(torch.tensor([[1.0, value, 0.0, 0.0]]))
    with pytest.raises(NumericError, match="activations must be finite"):
        accumulator.finish()
    hessian[2, 2] = value
    with pytest.raises(NumericError, match="must be finite"):
        solve(weight, hessian, QuantizeConfig(method="gptq", group_size=32))


def test_a_group_size_that_does_not_divide_lists_the_divisors() -> None:
    weight, hessian = make_layer()
    with pytest.raises(UsageError, match=r"128 does not divide 96.*\[8, 12, 16, 24, 32, 48, 96\]"):
        solve(weight, hessian, QuantizeConfig(method="gptq", group_size=128))


def test_gptq_without_data_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        solve(torch.ones(8, 32), None, QuantizeConfig(method="gptq", group_size=32))


def test_a_weight_too_large_for_float16_scales_is_refused() -> None:
    weight, hessian = make_layer()
    with pytest.raises(NumericError, match="float16"):
        solve(weight * 1e8, hessian, QuantizeConfig(method="gptq", group_size=32))


def test_hessian_is_the_mean_outer_product_for_any_width() -> None:
    for columns in (5, 512, 700, 1100):
        x = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
        accumulator = Hessian(columns, dtype=torch.float64)
        for part in x.split(7):
            accumulator.add(part)
        torch.testing.assert_close(accumulator.finish(), x.double().T @ x.double() / 40, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(_native.gram() is None, reason="no AVX-512 BF16 kernel here")
@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (7, 50), (64, 48), (257, 100), (300, 1030), (513, 96)])
def test_native_gram_is_as_exact_as_float32(tokens: int, columns: int) -> None:
    """Products of bfloat16 are exact in float32, so only the order of the sums differs: n additions, n eps at most."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        accumulator = Hessian(columns)
        accumulator.add(x)
        exact = x.double().T @ x.double() / tokens
        bound = torch.finfo(torch.float32).eps * tokens * (x.double().abs().T @ x.double().abs()) / tokens
        assert ((accumulator.finish().double() - exact).abs() <= bound + 1e-12).all()
        torch.set_num_threads(usual)


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, hessian = make_layer()
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    inverse, _, _ = inverse_factor(hessian, order, torch.zeros(COLUMNS, dtype=torch.bool), 0.01)
    factor = factor_rows(inverse, 0, COLUMNS)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-8, atol=1e-10)


def test_strict_makes_an_error_of_raised_damping_and_says_what_helps() -> None:
    weight, hessian = make_layer()
    hessian[4, 4] -= 0.05 * hessian.diagonal().mean() + hessian[4, 4]
    config = QuantizeConfig(method="gptq", group_size=32)
    assert solve(weight, hessian, config).fallback is not None
    with pytest.raises(NumericError, match=r"--strict forbids fallbacks, .* \(.*--damp-percent.*--skip"):
        solve(weight, hessian, QuantizeConfig(method="gptq", group_size=32, strict=True))


def test_the_reported_error_after_a_fallback_is_measured_with_what_was_used() -> None:
    weight, hessian = make_layer()
    nearest = solve(weight, hessian * 1e30, QuantizeConfig(method="gptq", group_size=32))
    assert not nearest.whole_hessian
    error = nearest.weight().double() - weight
    assert relative_error(weight, nearest, hessian * 1e30) == pytest.approx(
        float(error.square().sum() / weight.square().sum()), rel=1e-4
    )


def test_a_share_of_the_columns_that_is_damaged_leaves_the_others_their_feedback() -> None:
    """As if the damaged column had never had any input."""
    weight, hessian = make_layer()
    damaged, dead = hessian.clone(), hessian.clone()
    damaged[5, 40] = damaged[40, 5] = 1000 * hessian.diagonal().max()
    dead[5], dead[:, 5] = 0, 0
    config = QuantizeConfig(method="gptq", group_size=32)
    found = solve(weight, damaged, config)
    assert found.fallback is not None
    assert found.fallback.startswith("1 of 96 input columns rounded to nearest: ")
    assert torch.equal(found.codes, solve(weight, dead, config).codes)
