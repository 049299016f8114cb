"""The allocator must find what trying every combination finds."""

from __future__ import annotations

import itertools
import math
import random

import pytest

import qquant.allocation
from qquant.allocation import Allocation, Allocator, Option

Stages = list[list[Option]]


def everything(stages: Stages) -> list[Allocation]:
    """Every combination of options: the slow reference."""
    found = []
    for chosen in itertools.product(*(range(len(options)) for options in stages)):
        picked = [options[place] for options, place in zip(stages, chosen, strict=True)]
        size, cost = sum(option.size_bytes for option in picked), math.fsum(option.cost for option in picked)
        found.append(Allocation(chosen, size, cost))
    return found


def some_stages(seed: int, *, unit: int = 1) -> Stages:
    """Five stages of two to four options, dominated ones and equal ones among them."""
    draw = random.Random(seed)
    return [
        [Option(unit * draw.randint(3, 40), draw.choice([0.0, 0.5, draw.random()])) for _ in range(draw.randint(2, 4))]
        for _ in range(5)
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", [1, 96], ids=["odd sizes", "a common divisor"])
def test_the_least_cost_within_bytes_is_that_of_all_combinations(seed: int, unit: int) -> None:
    stages = some_stages(seed, unit=unit)
    allocator, combinations = Allocator(stages), everything(stages)
    for limit in range(allocator.least_bytes - unit, allocator.most_bytes + unit, max(1, unit // 2)):
        fitting = [one for one in combinations if one.size_bytes <= limit]
        found = allocator.within_bytes(limit)
        if not fitting:
            assert found is None
            continue
        assert found in fitting
        assert found is not None
        assert found.cost == pytest.approx(min(one.cost for one in fitting), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_fewest_bytes_within_a_cost_are_those_of_all_combinations(seed: int) -> None:
    stages = some_stages(seed)
    allocator, combinations = Allocator(stages), everything(stages)
    costs = sorted({one.cost for one in combinations})
    for limit in [(low + high) / 2 for low, high in itertools.pairwise(costs) if high - low > 1e-9]:
        found = allocator.within_cost(limit)
        assert found is not None
        assert found.cost <= limit
        assert found.size_bytes == min(one.size_bytes for one in combinations if one.cost <= limit)
    assert allocator.within_cost(costs[0] - 1e-3) is None


@pytest.mark.parametrize("seed", range(6))
def test_bytes_that_are_wanted_are_used_where_they_can_be(seed: int) -> None:
    stages = some_stages(seed)
    allocator, combinations = Allocator(stages), everything(stages)
    for limit in range(allocator.least_bytes, allocator.most_bytes + 1):
        near = [one for one in combinations if 0.9 * limit <= one.size_bytes <= limit]
        found = allocator.within_bytes(limit, wanted_bytes=math.ceil(0.9 * limit))
        assert found is not None
        assert found.size_bytes <= limit
        if near:
            assert found.size_bytes >= 0.9 * limit
            assert found.cost == pytest.approx(min(one.cost for one in near), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_both_smaller_and_cheaper_than_a_point_of_the_frontier(seed: int) -> None:
    stages = some_stages(seed)
    combinations = everything(stages)
    frontier = Allocator(stages).frontier(10)
    assert 1 <= len(frontier) <= 10
    for point in frontier:
        assert not [one for one in combinations if one.size_bytes < point.size_bytes and one.cost <= point.cost]
        assert not [one for one in combinations if one.size_bytes <= point.size_bytes and one.cost < point.cost - 1e-12]
    sizes, costs = [point.size_bytes for point in frontier], [point.cost for point in frontier]
    assert sizes == sorted(set(sizes))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(min(one.cost for one in combinations), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_sizes_that_are_rounded_still_fit_and_lose_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qquant.allocation, "_MOST_UNITS", 1000)
    stages = some_stages(seed, unit=1009)
    stages = [[Option(option.size_bytes + place, option.cost) for place, option in enumerate(s)] for s in stages]
    allocator, combinations = Allocator(stages), everything(stages)
    unit = -(-(allocator.most_bytes - allocator.least_bytes) // 1000)
    for limit in range(allocator.least_bytes, allocator.most_bytes, 5 * unit):
        found = allocator.within_bytes(limit)
        assert found is not None
        assert found.size_bytes <= limit
        # Each of five stages is rounded up by less than a unit, so whatever fits with as much room to spare is seen.
        seen = [one.cost for one in combinations if one.size_bytes <= limit - 5 * unit]
        assert found.cost <= min(seen, default=math.inf) + 1e-12


def test_one_option_each_leaves_no_choice() -> None:
    only = Allocator([[Option(10, 0.25)], [Option(20, 0.5)]])
    assert only.frontier(10) == [Allocation((0, 0), 30, 0.75)]
    assert only.within_bytes(29) is None
    assert only.within_cost(0.75) == only.within_bytes(1000) == Allocation((0, 0), 30, 0.75)
