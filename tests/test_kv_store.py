"""Storage of quantized vectors: how it grows, what it holds, how many bytes it says it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant import kv_ops
from qquant.kv_store import GROWTH, RESERVE_AHEAD, STEP, TokenStore


def states(tokens: int, *, batch: int = 2, heads: int = 3, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def filled(*parts: Tensor, reserve: int = 0) -> TokenStore:
    store = TokenStore(parts[0], reserve=reserve)
    for part in parts:
        store.append(part)
    return store


def held(store: TokenStore) -> Tensor:
    return kv_ops.decode(*store.last(store.tokens), torch.float32)


def test_appended_tokens_come_back_in_order_however_they_were_split() -> None:
    x = states(300)
    expected = kv_ops.decode(*kv_ops.encode(x), torch.float32)
    for sizes in ([300], [1] * 300, [7, 64, 1, 128, 100]):
        assert torch.equal(held(filled(*x.split(sizes, dim=2))), expected)


@pytest.mark.parametrize("kernel", [True, False])
def test_kernel_and_reference_store_the_same_bits(kernel: bool) -> None:
    store = TokenStore(states(5))
    store.append(states(5), kernel=kernel)
    for got, wanted in zip(store.last(5), kv_ops.encode(states(5)), strict=True):
        assert torch.equal(got, wanted)


def test_room_not_used_stays_near_one_part_in_32() -> None:
    store = TokenStore(states(1, batch=1, heads=1, dim=8))
    for _ in range(6000):
        store.append(states(1, batch=1, heads=1, dim=8))
        assert store.room - store.tokens <= max(store.tokens // GROWTH, 0) + STEP


def test_growing_is_rare() -> None:
    store = TokenStore(states(1, batch=1, heads=1, dim=8))
    moves, room = 0, store.room
    for _ in range(6000):
        store.append(states(1, batch=1, heads=1, dim=8))
        moves, room = moves + (store.room != room), store.room
    # By steps of 64 up to 64 * 32 tokens, by one part in 32 after that: 32 + log(6000 / 2048) / log(33 / 32) at most,
    # and one more for every step that rounding to whole steps shortens.
    assert moves <= 32 + 35 + 5


def test_a_reserved_store_never_moves() -> None:
    store = filled(states(10), reserve=500)
    before = store.codes.data_ptr()
    for part in states(490, seed=1).split(1, dim=2):
        store.append(part)
    assert store.codes.data_ptr() == before


def test_a_reserve_far_beyond_the_prompt_is_not_taken_at_once() -> None:
    assert TokenStore(states(10), reserve=1_000_000).room <= 10 + RESERVE_AHEAD + STEP


def test_bytes_are_those_of_the_memory_held() -> None:
    store = filled(states(100))
    # 16 codes of one byte and two numbers of two bytes per vector; room for 128 vectors in each of 6 heads.
    assert store.nbytes == 6 * 128 * (16 + 2 + 2)
    assert store.nbytes_used == 6 * 100 * (16 + 2 + 2)


def test_forgetting_the_newest_moves_nothing() -> None:
    x = states(20)
    store = filled(x)
    before = store.codes.data_ptr()
    store.drop_newest(5)
    assert store.codes.data_ptr() == before
    assert torch.equal(held(store), held(filled(x[:, :, :15])))


def test_forgetting_more_than_there_is_leaves_nothing() -> None:
    store = filled(states(3))
    store.drop_newest(10)
    assert store.tokens == 0


@pytest.mark.parametrize("count", [0, 3, 19, 20, 50])
def test_only_the_newest_are_kept(count: int) -> None:
    x = states(20)
    store = filled(x)
    store.keep_newest(count, room=10)
    assert torch.equal(held(store), held(filled(x))[:, :, max(0, 20 - count) :])


def test_selected_rows_are_copies_of_their_own() -> None:
    x = states(20)
    store = filled(x)
    store.select(torch.tensor([1, 1, 0]))
    assert torch.equal(held(store), held(filled(x))[[1, 1, 0]])
    store.append(states(1, batch=3, seed=9))
    assert torch.equal(held(store)[:, :, :20], held(filled(x))[[1, 1, 0]])


def test_a_selection_keeps_the_room() -> None:
    store = filled(states(20), reserve=400)
    store.select(torch.tensor([0]))
    assert store.room >= 400
