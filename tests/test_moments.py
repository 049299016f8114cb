"""Moments are means over tokens, whatever pieces the tokens come in; what several ranks sum up is in test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant.errors import NumericError
from qquant.moments import CrossMoment, Hessian

EPS = torch.finfo(torch.float32).eps


def activations(*, tokens: int = 60, columns: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("piece", [1, 7, 60])
def test_a_cross_moment_is_the_mean_product_of_miss_and_input(piece: int) -> None:
    wanted, got, inputs = activations(columns=12, seed=1), activations(columns=12, seed=2), activations()
    moment = CrossMoment(12, 20, dtype=torch.float64)
    for parts in zip(wanted.split(piece), got.split(piece), inputs.split(piece), strict=True):
        moment.add(*parts)
    assert moment.tokens == 60
    torch.testing.assert_close(moment.finish(), (wanted - got).T @ inputs / 60, rtol=1e-12, atol=1e-12)


def test_a_small_miss_of_large_activations_is_not_lost() -> None:
    """Two moments taken apart would differ by eps of 10^4 times 10^4; the difference itself is exact in float32."""
    got = activations().float() * 1e4
    wanted = got + torch.randn(60, 20, generator=torch.Generator().manual_seed(4)).sign()
    moment = CrossMoment(20, 20)
    moment.add(wanted, got, got)
    miss = (wanted - got).double()
    expected = miss.T @ got.double() / 60
    bound = 60 * EPS * (miss.abs().T @ got.double().abs()) / 60
    assert ((moment.finish().double() - expected).abs() <= bound).all()


def test_bfloat16_activations_are_summed_in_float32() -> None:
    wanted, got = (activations(seed=seed).bfloat16() for seed in (1, 2))
    moment = CrossMoment(20, 20)
    moment.add(wanted, got, got)
    expected = (wanted.double() - got.double()).T @ got.double() / 60
    bound = 2 * 62 * EPS * ((wanted.double().abs() + got.double().abs()).T @ got.double().abs()) / 60
    # The compiled sum takes the difference in bfloat16: exact where the two are within a factor of 2, else off by at
    # most half a unit in the last of its 8 bits.
    bound += 2.0**-9 * ((wanted.double() - got.double()).abs().T @ got.double().abs()) / 60
    found = moment.finish()
    assert found.dtype == torch.float32
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_moments_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    wanted, got = (activations(tokens=300, columns=64, seed=seed).to(dtype) for seed in (1, 2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cross, hessian = CrossMoment(64, 64), Hessian(64)
            cross.add(wanted, got, got)
            hessian.add(got)
            found.append((cross.finish(), hessian.finish()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_a_cross_moment_that_met_no_token_is_zero() -> None:
    assert not CrossMoment(3, 4).finish().any()


def test_a_hessian_that_met_no_token_is_an_error() -> None:
    with pytest.raises(NumericError, match="at least one calibration token"):
        Hessian(4).finish()


def test_close_bfloat16_activations_lose_nothing_in_their_difference() -> None:
    got = activations(seed=1).bfloat16()
    wanted = (got.double() * (1 + 0.01 * activations(seed=2).double().sign())).bfloat16()
    moment = CrossMoment(20, 20)
    moment.add(wanted, got, got)
    expected = (wanted.double() - got.double()).T @ got.double() / 60
    bound = 2 * 62 * EPS * ((wanted.double() - got.double()).abs().T @ got.double().abs()) / 60
    assert ((moment.finish().double() - expected).abs() <= bound).all()


def test_lanes_are_summed_by_themselves_and_added_in_their_order() -> None:
    """In float32 the order shows: 1 is lost beside 2^30, and is not where the large ones cancel first."""
    columns = torch.tensor([[2.0**15], [1.0], [2.0**15]])
    one_lane, three_lanes = CrossMoment(1, 1), CrossMoment(1, 1)
    for row, sign in zip(columns, (1.0, 1.0, -1.0), strict=True):
        for moment in (one_lane, three_lanes):
            moment.add(sign * row[None], torch.zeros(1, 1), row[None])
        three_lanes.end_lane()
    large_first = CrossMoment(1, 1)
    large_first.add(columns[:1], torch.zeros(1, 1), columns[:1])
    large_first.add(-columns[2:], torch.zeros(1, 1), columns[2:])
    large_first.end_lane()
    large_first.add(columns[1:2], torch.zeros(1, 1), columns[1:2])
    assert (one_lane.finish().item(), three_lanes.finish().item()) == (0.0, 0.0)
    assert large_first.finish().item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_lane_is_summed_as_if_it_were_all(dtype: torch.dtype) -> None:
    lanes = [activations(tokens=30, columns=300, seed=seed).to(dtype) for seed in range(3)]
    whole, sums = Hessian(300), []
    for lane in lanes:
        alone = Hessian(300)
        for moment in (whole, alone):
            moment.add(lane[:11])
            moment.add(lane[11:])
        whole.end_lane()
        sums.append(alone.finish().mul_(30))
    assert whole.tokens == 90
    # Multiplying by the number of tokens does not undo the division bit for bit: an error of both roundings.
    expected = (sums[0] + sums[1] + sums[2]) / 90
    torch.testing.assert_close(whole.finish(), expected, rtol=8 * EPS, atol=8 * EPS * float(expected.abs().max()))


def test_a_lane_without_tokens_changes_no_bit() -> None:
    rows = torch.tensor([[-0.0, 1.0]])
    plain, with_empty = CrossMoment(1, 2), CrossMoment(1, 2)
    for moment in (plain, with_empty):
        moment.add(rows[:, :1], torch.zeros(1, 1), rows)
    for _ in range(3):
        with_empty.end_lane()
    assert torch.equal(plain.finish().view(torch.int32), with_empty.finish().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocks_along_the_diagonal_are_those_of_moments_of_their_own(dtype: torch.dtype) -> None:
    inputs = activations(tokens=50, columns=96, seed=3).to(dtype)
    together, apart = Hessian(96, side=32), [Hessian(32) for _ in range(3)]
    for sample in inputs.split(17):
        together.add(sample)
        for part, moment in zip(sample.split(32, dim=1), apart, strict=True):
            moment.add(part)
    assert torch.equal(together.finish(), torch.stack([moment.finish() for moment in apart]))


def test_blocks_that_met_no_token_or_a_bad_one_are_errors() -> None:
    with pytest.raises(NumericError, match="at least one calibration token"):
        Hessian(4, side=2).finish()
    spoiled = Hessian(4, side=2)
    spoiled.add(torch.tensor([[1.0, 1.0, 1.0, torch.inf]]))
    with pytest.raises(NumericError, match="must be finite"):
        spoiled.finish()
