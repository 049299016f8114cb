"""What can be cut over cards, and how wide an MLP has to be for it. Plans are test_plan.py, zeros test_padding.py."""

from __future__ import annotations

from typing import Any

import pytest

from qquant.stored_bytes import CacheShape, LinearShape, ModelShapes
from qquant.tensor_parallel import Packing, padded_width, step, uncut


def linear(name: str, inputs: int, outputs: int, *, tail: bool = False) -> LinearShape:
    return LinearShape(name=name, inputs=inputs, outputs=outputs, bias=False, tail=tail)


def shapes(*linears: LinearShape, heads: int = 8, kv_heads: int = 8) -> ModelShapes:
    layer = CacheShape(heads=kv_heads, key_dim=16, value_dim=16, window=None)
    numbers: dict[str, Any] = dict.fromkeys(
        ("parameters", "largest_tensor", "hidden", "query_width", "vocabulary", "embedding_parameters"), 1
    )
    return ModelShapes(
        model_type="llama", linears=linears, caches=(layer,), stages=(), query_heads=heads, query_norms=False,
        tied=False, positions=None, **numbers,
    )  # fmt: skip


UP, DOWN = linear("block.up", 64, 96), linear("block.down", 96, 64, tail=True)
STEPS: dict[str, tuple[LinearShape, Packing | None, int]] = {
    "not packed": (DOWN, None, 1),
    "words of outputs": (UP, Packing(4, 128), 8),
    "words of 3 bits": (UP, Packing(3, 128), 32),
    "groups of a tail": (DOWN, Packing(4, 128), 128),
    "a tail's whole row": (DOWN, Packing(8, -1), 4),
    "groups that fill no words": (DOWN, Packing(4, 12), 24),
}


@pytest.mark.parametrize(("matrix", "packing", "expected"), list(STEPS.values()), ids=list(STEPS))
def test_a_card_gets_whole_words_and_a_tail_whole_groups(
    matrix: LinearShape, packing: Packing | None, expected: int
) -> None:
    assert step(matrix, packing) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("packing", [None, Packing(4, 32), Packing(3, -1), Packing(8, 12)], ids=str)
def test_the_padded_width_is_the_least_that_can_be_cut(packing: Packing | None, ranks: int) -> None:
    width = padded_width(96, (UP, DOWN), lambda name: packing, ranks)

    def divides(width: int) -> bool:
        both = linear("block.up", 64, width), linear("block.down", width, 64, tail=True)
        return uncut(shapes(*both, heads=ranks, kv_heads=1), lambda name: packing, ranks) is None

    found = next(n for n in range(96, 10_000) if divides(n) and (packing is None or n % step(DOWN, packing) == 0))
    assert width == found


def test_72b_gets_one_group_more_for_eight_cards() -> None:
    both = linear("up", 8192, 29568), linear("down", 29568, 8192, tail=True)
    assert padded_width(29568, both, lambda name: Packing(4, 128), 8) == 29696


def test_each_linear_is_judged_by_its_own_packing() -> None:
    finer = {"block.up": Packing(4, 32), "block.down": Packing(4, 16)}
    assert uncut(shapes(UP, DOWN), lambda name: Packing(4, 32), 2) == "block.down: 96 / 32 = 3 groups by 2"
    assert uncut(shapes(UP, DOWN), finer.get, 2) is None
    assert uncut(shapes(UP, DOWN), {"block.up": Packing(4, 32)}.get, 2) is None


def test_a_short_last_group_cannot_be_cut() -> None:
    assert uncut(shapes(DOWN), lambda name: Packing(4, 64), 2) == "block.down: 96 / 64 = 1.5 groups by 2"
    assert uncut(shapes(DOWN), lambda name: Packing(4, 64), 1) is None


def test_keys_and_values_that_lie_on_several_cards_are_cut_between_heads_only() -> None:
    keys, queries = linear("block.k_proj", 64, 16), linear("block.q_proj", 64, 16)
    assert uncut(shapes(keys, kv_heads=1), lambda name: Packing(4, 32), 8) is None  # all of it on each card
    assert uncut(shapes(queries, kv_heads=1), lambda name: Packing(4, 32), 8) == (
        "block.q_proj: 16 outputs in whole words by 8"
    )
