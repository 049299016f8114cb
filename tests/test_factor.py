"""The order of columns and products with the inverse, against explicit elimination and inversion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant.columns import mismatch_feedback
from qquant.errors import NumericError
from qquant.factor import column_order, factor_rows, inverse_factor, smallest_pivot_last, times_inverse
from qquant.methods import Order
from tests.method_reference import make_layer
from tests.reference import damped_hessian, pivot_ranks, visiting_order


def hessian_of(columns: int = 48, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    return make_layer(columns=columns, seed=seed, dead=dead).moments().inputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_pivots_are_those_of_explicit_elimination(seed: int, dtype: torch.dtype) -> None:
    hessian = hessian_of(seed=seed).to(dtype)
    before = hessian.clone()
    ranks = pivot_ranks(hessian.double())
    assert [ranks[column] for column in smallest_pivot_last(hessian).tolist()] == list(range(48))
    assert torch.equal(hessian, before)


def test_of_the_pivots_the_smallest_is_last() -> None:
    """Three columns by hand: the third is nearly the sum of the others, so little of it is left after them."""
    hessian = torch.tensor([[4.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.5]]).double()
    # Smallest diagonal: 1. What is left of the others is as before, so 1.5 goes next, 4 comes first.
    assert smallest_pivot_last(hessian).tolist() == [0, 2, 1]


@pytest.mark.parametrize("order", ["left-to-right", "group-aware", "pivot"])
@pytest.mark.parametrize("size", [8, 16, 48])
@pytest.mark.parametrize("act_order", ["", "desc_act", "static"])
def test_orders_are_those_of_the_reference(order: Order, size: int, act_order: str) -> None:
    hessian = hessian_of()
    found, group_of = column_order(hessian, size, order, desc_act=bool(act_order), static_groups=act_order == "static")
    expected = visiting_order(hessian, size, bool(act_order), order == "group-aware", order == "pivot")
    assert found.tolist() == expected
    regrouped = act_order == "desc_act"
    assert group_of.tolist() == [p // size if regrouped else c // size for p, c in enumerate(expected)]


@pytest.mark.parametrize("order", ["group-aware", "pivot"])
def test_without_act_order_groups_are_visited_whole(order: Order) -> None:
    found, group_of = column_order(hessian_of(dead=(1, 2, 40)), 8, order)
    assert sorted(found.tolist()) == list(range(48))
    assert all(len(set(part.tolist())) == 1 for part in group_of.split(8))


def test_hopeless_hessians_still_give_an_order() -> None:
    for hessian in (torch.zeros(8, 8), -torch.eye(8), torch.ones(8, 8) * 1e30, torch.eye(8) - 2):
        assert sorted(smallest_pivot_last(hessian.double()).tolist()) == list(range(8))


@pytest.mark.parametrize("columns", [48, 300])
@pytest.mark.parametrize("dead", [(), (0, 17)], ids=["", "dead"])
def test_products_with_the_inverse_are_those_with_the_inverted_matrix(columns: int, dead: tuple[int, ...]) -> None:
    """300 columns are inverted by halves."""
    hessian = hessian_of(columns, dead=dead)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(5))
    inverse, _, _ = inverse_factor(hessian, order, hessian.diagonal() == 0, 0.01)
    matrix = torch.randn(7, columns, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    before = matrix.clone()
    expected = matrix @ torch.linalg.inv(damped_hessian(hessian, 0.01))
    torch.testing.assert_close(times_inverse(matrix, inverse, order), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(matrix, before)
    factor = factor_rows(inverse, 0, columns)
    whole = torch.linalg.inv(damped_hessian(hessian, 0.01)[order][:, order])
    torch.testing.assert_close(factor.T @ factor, whole, rtol=1e-8, atol=1e-10)


def test_mismatch_feedback_is_the_definitions() -> None:
    """Row q is the mismatch of q times the inverse of the Hessian of the columns behind q."""
    moments = make_layer(columns=24).moments()
    assert moments.mismatch is not None
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    inverse, _, _ = inverse_factor(moments.inputs, order, moments.inputs.diagonal() == 0, 0.01)
    found = mismatch_feedback(moments.mismatch, inverse, order, 0.5)
    assert found is not None
    hessian = damped_hessian(moments.inputs, 0.01)[order][:, order]
    mismatch = moments.mismatch[order][:, order]
    for q in range(24):
        expected = 0.5 * mismatch[q, q + 1 :] @ torch.linalg.inv(hessian[q + 1 :, q + 1 :])
        torch.testing.assert_close(found[q, q + 1 :], expected, rtol=1e-8, atol=1e-10)
        assert (found[q, : q + 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("columns", [100, 148, 172, 268, 640, 1000])
def test_factors_do_not_depend_on_threads(columns: int, dtype: torch.dtype) -> None:
    """LAPACK's own factorization of so many columns does, and triangular solves of these do."""
    hessian = hessian_of(columns).to(dtype)
    order, dead = torch.arange(columns), torch.zeros(columns, dtype=torch.bool)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(inverse_factor(hessian, order, dead, 0.01)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_what_is_not_positive_definite_is_seen_wherever_it_stands(bad: float, place: int) -> None:
    hessian = torch.eye(300).double()
    hessian[place, place] = bad
    with pytest.raises(NumericError, match="positive definite"):
        inverse_factor(hessian, torch.arange(300), torch.zeros(300, dtype=torch.bool), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_pivot_below_half_the_damping_is_not_trusted(dtype: torch.dtype) -> None:
    """Cholesky goes through with it, but no positive semidefinite matrix has one."""
    hessian, order, dead = torch.eye(8, dtype=dtype), torch.arange(8), torch.zeros(8, dtype=torch.bool)
    mean = 7 / 8
    hessian[3, 3] = -0.004 * mean
    assert inverse_factor(hessian, order, dead, 0.01)[2] == 0
    hessian[3, 3] = -0.006 * mean
    assert inverse_factor(hessian, order, dead, 0.01)[1:] == (0.1, 1)


def test_damping_is_raised_no_more_often_than_asked() -> None:
    hessian, order, dead = torch.eye(8), torch.arange(8), torch.zeros(8, dtype=torch.bool)
    hessian[3, 3] = -0.3
    assert inverse_factor(hessian, order, dead, 0.01)[2] == 2
    with pytest.raises(NumericError, match=r"failed up to damp_percent 0\.1;"):
        inverse_factor(hessian, order, dead, 0.01, raises=1)
