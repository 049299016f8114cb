"""No part of a method may choose by the size of blocks, by the number of threads, or by the rows beside a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from qquant.config import QuantizeConfig
from qquant.moments import Moments
from qquant.solver import Solution, solve
from tests.method_reference import Layer, make_layer

PARTS: dict[str, dict[str, Any]] = {
    "fast": {"method": "fast"},
    "gptaq": {"method": "gptaq+clip-off"},
    "gptaq desc_act": {"method": "gptaq:0.5+clip-off", "desc_act": True},
    "qep": {"method": "qep:0.7+clip-off"},
    "residual": {"method": "residual:0.5+clip-off"},
    "pivot": {"method": "pivot+clip-off"},
    "clip weight": {"method": "clip-weight"},
    "clip hessian": {"method": "clip-hessian", "sym": False},
    "clip loop": {"method": "clip-loop"},
    "clip loop desc_act": {"method": "clip-loop", "desc_act": True, "bits": 3},
    "signed": {"method": "signed"},
    "output": {"method": "output+refine:1+clip-off"},
    "refine": {"method": "refine:2+clip-off"},
    "refine desc_act": {"method": "refine:1+clip-off", "desc_act": True, "sym": False},
    "refine static act-order": {"method": "refine:1+clip-off", "desc_act": True, "static_groups": True},
    "all of gptaq's": {"method": "gptaq:0.5+residual+pivot+clip-loop+signed+output+refine:1"},
    "best": {"method": "best"},
    "best int8 row": {"method": "best", "bits": 8, "group_size": -1},
}


@pytest.fixture(scope="module")
def layer() -> Layer:
    """More columns than a corner of the factor and than a block of refinement, and no multiple of either."""
    return make_layer(rows=8, columns=192, seed=1)


@pytest.fixture(params=list(PARTS.values()), ids=list(PARTS))
def config(request: pytest.FixtureRequest) -> QuantizeConfig:
    return QuantizeConfig(**{"group_size": 24, **request.param})


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same(found: Solution, expected: Solution) -> None:
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def in_float32(moments: Moments) -> Moments:
    return replace(moments, **{name: part.float() for name, part in vars(moments).items() if part is not None})


def test_no_part_depends_on_the_block_size(layer: Layer, config: QuantizeConfig) -> None:
    """In float64, where sums in another order do not reach a tie: smaller than a group, not a divisor, all at once."""
    moments = layer.moments(side=4)
    expected = solve(layer.weight, moments, config, block_size=128)
    for block_size in (1, 10, 24, 64, 100, 192, 1000):
        assert_same(solve(layer.weight, moments, config, block_size=block_size), expected)


def test_no_part_depends_on_the_number_of_threads(layer: Layer, config: QuantizeConfig, threads: None) -> None:
    """In float32, as models are quantized."""
    weight, moments = layer.weight.float(), in_float32(layer.moments(side=4))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(solve(weight, moments, config))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_no_part_depends_on_the_linears_that_are_solved_together(layer: Layer, config: QuantizeConfig) -> None:
    """Rows see those of their own block of outputs at most, and a block belongs to one linear."""
    moments = layer.moments(side=4)
    assert moments.residual is not None
    assert moments.outputs is not None
    whole = solve(layer.weight, moments, config)
    for n, part in enumerate(whole.split([4, 4])):
        rows = slice(4 * n, 4 * n + 4)
        own = replace(moments, residual=moments.residual[rows], outputs=moments.outputs[n : n + 1])
        assert_same(solve(layer.weight[rows], own, config), part)
