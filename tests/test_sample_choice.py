"""Which candidates become samples: the draw as it always was, one from every stretch, and nothing twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant.errors import UsageError
from qquant.sample_choice import Choice, check_select


def chosen(rows: list[Tensor], wanted: int, select: str, seed: int = 0) -> list[int]:
    choice = Choice(wanted, select, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return [index for index in choice.order(len(rows)) if choice.takes(rows[index])]


def random_rows(count: int, length: int = 40) -> list[Tensor]:
    return list(torch.randint(0, 1000, (count, length), generator=torch.Generator().manual_seed(5)))


def test_random_is_the_head_of_a_shuffle() -> None:
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:7].tolist()
    assert chosen(random_rows(50), 7, "random", seed=3) == expected


@pytest.mark.parametrize("count", [8, 11, 50, 512])
def test_spread_takes_one_from_every_stretch(count: int) -> None:
    found = chosen(random_rows(count), 8, "spread")
    assert [index * 8 // count for index in found] == list(range(8))


def test_spread_depends_on_the_seed_alone() -> None:
    rows = random_rows(64)
    assert chosen(rows, 8, "spread", 1) == chosen(rows, 8, "spread", 1) != chosen(rows, 8, "spread", 2)


@pytest.mark.parametrize("select", ["random", "spread"])
def test_all_are_taken_where_there_are_no_more(select: str) -> None:
    assert sorted(chosen(random_rows(5), 9, select)) == list(range(5))


def test_spread_takes_no_copy_and_goes_on_elsewhere() -> None:
    rows = random_rows(40)
    rows[20:] = [rows[20]] * 20
    found = chosen(rows, 8, "spread")
    assert len(found) == 8
    assert sum(index >= 20 for index in found) == 1


def test_a_copy_with_small_changes_or_shifted_is_a_copy() -> None:
    (text,) = random_rows(1, length=200)
    changed = text.clone()
    changed[100] += 1  # 16 runs of 185 are new
    shifted = torch.cat([text[7:], random_rows(1, length=7)[0]])
    assert len(chosen([text, changed, shifted], 3, "spread")) == 1


def test_half_new_is_new() -> None:
    (text,) = random_rows(1, length=300)
    assert len(chosen([text[:200], text[100:]], 2, "spread")) == 2


def test_a_repeated_token_is_no_sample() -> None:
    assert sorted(chosen([torch.full((100,), 7), *random_rows(2)], 3, "spread")) == [1, 2]


def test_samples_shorter_than_a_run_are_compared_whole() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])]
    found = chosen(rows, 3, "spread")
    assert len(found) == 2
    assert 2 in found


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="select must be random or spread, got 'best'"):
        check_select("best")
