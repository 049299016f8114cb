"""Attention of one token over a bfloat16 cache: against float64, and which calls of transformers it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qquant import plain_attention as room
from qquant.plain_attention import attend, decode_attention, serves
from tests.processor import needs_attention

# batch, query heads, KV heads, size of keys, size of values, tokens
SHAPES = {
    "one_token": (1, 4, 4, 64, 64, 1),
    "every_head_its_own": (1, 16, 16, 128, 128, 64),
    "grouped": (2, 14, 2, 64, 64, 200),
    "two_passes_of_a_group": (1, 18, 2, 32, 32, 33),
    "odd_sizes": (2, 9, 3, 7, 5, 17),
    "values_of_another_size": (1, 6, 2, 80, 72, 40),
    "large_heads": (1, 4, 2, 256, 256, 20),
    "no_tokens": (1, 4, 2, 16, 16, 0),
    "no_sequences": (0, 4, 2, 16, 16, 5),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def states(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in bfloat16, the query strided as a model's is."""
    batch, heads, kv_heads, size, value_size, tokens = request.param
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 1, heads, size, generator=generator).bfloat16().transpose(1, 2)
    key = torch.randn(batch, kv_heads, tokens, size, generator=generator).bfloat16()
    value = torch.randn(batch, kv_heads, tokens, value_size, generator=generator).bfloat16()
    return query, key, value


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention in float64; rows that see nothing are zero."""
    group = query.shape[1] // key.shape[1]
    keys, values = (states.double().repeat_interleave(group, 1) for states in (key, value))
    scores = query.double() @ keys.mT * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ values


def assert_close_to_float64(found: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """One rounding to bfloat16, and float32's: a score's error of s * D roundings multiplies its weight by 1 + that.

    Scores here are sums of D products of normal numbers times D**-0.5, below 8 in magnitude, and the magnitudes of the
    products sum to less than D**0.5 * 4; sums over tokens add one rounding per token of the largest value, 6.
    """
    scaling = query.shape[-1] ** -0.5
    expected = exact(query, key, value, mask, scaling)
    steps = 2 * query.shape[-1] ** 1.5 + 2 * key.shape[2] + 64
    bound = 2.0**-8 * expected.abs() + steps * 2.0**-24 * 6
    assert ((found.double() - expected).abs() <= bound).all()


@needs_attention
@pytest.mark.parametrize("masked", ["no_mask", "one_for_all_heads", "one_per_head", "one_per_sequence"])
def test_the_operator_is_as_exact_as_float32(states: tuple[Tensor, Tensor, Tensor], masked: str) -> None:
    query, key, value = states
    batch, heads, tokens = query.shape[0], query.shape[1], key.shape[2]
    shape = {"one_for_all_heads": (1, 1), "one_per_head": (1, heads), "one_per_sequence": (batch, 1)}.get(masked)
    generator = torch.Generator().manual_seed(1)
    mask = None if shape is None else torch.rand(*shape, 1, tokens, generator=generator) > 0.4
    found = decode_attention(query, key, value, mask, query.shape[-1] ** -0.5)
    assert found.shape == (batch, heads, 1, value.shape[-1])
    assert found.is_contiguous()
    assert_close_to_float64(found, query, key, value, mask)


@needs_attention
def test_a_view_into_longer_storage_is_read_as_it_lies() -> None:
    room_for = torch.randn(2, 2, 50, 64).bfloat16()
    query = torch.randn(2, 4, 1, 64).bfloat16()
    key, value = room_for[:, :, 3:30], room_for[:, :, 20:47]
    found = decode_attention(query, key, value, None, 0.125)
    assert torch.equal(found, decode_attention(query, key.contiguous(), value.contiguous(), None, 0.125))


@needs_attention
def test_a_sequence_is_computed_alike_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 2, n, 64, generator=generator).bfloat16() for n in (1, 700, 700))
    together = decode_attention(query, key, value, None, 0.125)
    alone = [decode_attention(query[i : i + 1], key[i : i + 1], value[i : i + 1], None, 0.125) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


@needs_attention
def test_a_query_that_sees_nothing_gives_zeros() -> None:
    query, key = torch.randn(2, 2, 1, 16).bfloat16(), torch.randn(2, 2, 5, 16).bfloat16()
    mask = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 5)
    found = decode_attention(query, key, key, mask, 0.25)
    assert found[0].abs().sum() > 0
    assert (found[1] == 0).all()


@needs_attention
@pytest.mark.parametrize("size", [1e4, 1e18, 1e38], ids=str)
def test_large_scores_do_not_overflow_the_softmax(size: float) -> None:
    query = torch.full((1, 1, 1, 16), 1.0).bfloat16()
    key = torch.stack([torch.full((16,), sign * size / 16) for sign in (-1.0, 1.0)])[None, None].bfloat16()
    value = torch.stack([torch.full((16,), 1.0), torch.full((16,), 2.0)])[None, None].bfloat16()
    assert (decode_attention(query, key, value, None, 1.0) == 2).all()


@needs_attention
def test_what_is_not_a_number_stays_so_and_harms_nobody_else() -> None:
    query, key = torch.randn(2, 2, 1, 16).bfloat16(), torch.randn(2, 2, 40, 16).bfloat16()
    key[1, 0, 7, 3] = float("nan")
    found = decode_attention(query, key, key, None, 0.25)
    assert found[1, 0].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, 1].isfinite().all()


@needs_attention
def test_the_operator_is_well_formed() -> None:
    query, key, value = (torch.randn(2, n, t, 16).bfloat16() for n, t in ((4, 1), (2, 6), (2, 6)))
    mask = torch.rand(2, 1, 1, 6) > 0.5
    for given in (None, mask):
        torch.library.opcheck(decode_attention, (query, key, value, given, 0.25))


@needs_attention
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": torch.ones(1, 4, 2, 16).bfloat16()}, "query"),
        ({"query": torch.ones(1, 3, 1, 16).bfloat16()}, "query"),
        ({"value": torch.ones(1, 2, 7, 16).bfloat16()}, "value"),
        ({"mask": torch.ones(1, 1, 1, 5, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(1, 1, 1, 6)}, "mask must be"),
        ({"key": torch.ones(1, 2, 6, 16)}, "dtype|bfloat16"),
    ],
    ids=["two_tokens", "uneven_heads", "lengths", "mask", "mask_dtype", "dtype"],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, Tensor], said: str) -> None:
    plain = torch.ones(1, 2, 6, 16).bfloat16()
    given = {"query": torch.ones(1, 4, 1, 16).bfloat16(), "key": plain, "value": plain, "mask": None, **changes}
    with pytest.raises(RuntimeError, match=said):
        decode_attention(given["query"], given["key"], given["value"], given["mask"], 0.25)


CALL: dict[str, Any] = {
    "query": torch.ones(1, 4, 1, 16).bfloat16(),
    "key": torch.ones(1, 2, 6, 16).bfloat16(),
    "value": torch.ones(1, 2, 6, 16).bfloat16(),
    "mask": None,
    "options": {"scaling": 0.25, "dropout": 0.0, "sliding_window": None},
}


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"mask": torch.ones(1, 1, 1, 6, dtype=torch.bool)}, True),
        ({"query": torch.ones(1, 4, 2, 16).bfloat16()}, False),
        ({"query": torch.ones(1, 4, 1, 16)}, False),
        ({"query": torch.ones(1, 4, 1, 16).bfloat16().requires_grad_()}, False),
        ({"key": torch.ones(1, 2, 16, 6).bfloat16().mT}, False),
        ({"mask": torch.zeros(1, 1, 1, 6).bfloat16()}, False),
        ({"options": {"dropout": 0.1}}, False),
        ({"options": {"position_bias": torch.ones(1, 1, 1, 6)}}, False),
        ({"options": {"s_aux": torch.ones(4)}}, False),
    ],
    ids=[
        "plain", "bool_mask", "prompt", "float32", "gradient", "strided", "float_mask", "dropout", "bias", "sinks",
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_know_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], served: bool
) -> None:
    monkeypatch.setattr(room, "kernel_is_live", lambda: True)
    assert serves(**{**CALL, **changes}) is served


def test_nothing_is_served_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "kernel_is_live", lambda: False)
    assert not serves(**CALL)


@needs_attention
def test_the_result_is_laid_out_as_transformers_wants_it() -> None:
    query, key, value = (torch.randn(2, n, t, 16).bfloat16() for n, t in ((4, 1), (2, 6), (2, 6)))
    found, weights = attend(query, key, value, None, {})
    assert weights is None
    assert found.is_contiguous()
    assert torch.equal(found, decode_attention(query, key, value, None, 0.25).transpose(1, 2))
