"""The CUDA kernels of the KV cache, run thread by thread on a CPU by csrc/emu.h, against the references of kv_ops.

Proves indexing, tails, masks, strides, barriers and arithmetic. Says nothing of speed, of races that need true
concurrency, and of PTX: see docs/native.md.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qquant import kv_ops
from tests.csrc.emulator import Emulator, EmulatorError, build

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="compiles the kernels with g++ on Linux"
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIMS = {"eight": 8, "small": 24, "64": 64, "80": 80, "120": 120, "128": 128, "256": 256, "odd": 37, "long": 300}


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length: int
    tokens: int
    key_dim: int
    value_dim: int


SHAPES = {
    "multi_head": Shape(2, 3, 3, 1, 300, 128, 128),
    "one_token": Shape(1, 2, 2, 1, 1, 128, 128),
    "a_tile_and_one": Shape(1, 2, 2, 1, 33, 64, 64),
    "groups_of_4": Shape(1, 8, 2, 1, 777, 64, 64),
    "groups_of_7": Shape(1, 14, 2, 1, 261, 128, 128),
    "one_kv_head": Shape(1, 20, 1, 1, 130, 128, 128),
    "three_queries": Shape(1, 4, 2, 3, 131, 80, 80),
    "three_queries_three_keys": Shape(1, 2, 2, 3, 3, 64, 64),
    "groups_of_7_three_queries": Shape(1, 7, 1, 3, 150, 128, 128),
    "256": Shape(1, 2, 1, 1, 200, 256, 256),
    "keys_longer": Shape(1, 2, 1, 1, 140, 192, 128),
    "values_longer": Shape(1, 2, 1, 1, 140, 64, 96),
    "multiples_of_8": Shape(1, 2, 2, 1, 70, 72, 120),
    "multiples_of_8_long": Shape(1, 2, 2, 1, 70, 200, 8),
    "smallest": Shape(1, 1, 1, 1, 40, 8, 8),
}
Cache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    # The base folder is shared by the workers of one run, and the file in it is named by its content.
    return Emulator(build(tmp_path_factory.getbasetemp().parent / "qquant-emulator"))


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def either_order(request: pytest.FixtureRequest, emulator: Emulator) -> Iterator[Emulator]:
    """Threads of a block run from the first to the last, or from the last to the first."""
    emulator.reverse(request.param)
    yield emulator
    emulator.reverse(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows as models have them: a few channels far off zero, and one row each that is constant and zero."""
    values = torch.randn(*shape, generator=generator(seed)) * 2
    values[..., : max(1, shape[-1] // 16)] += 9
    values[..., -1:, :] = 3.25
    values[..., :1, :] = 0
    return values.to(dtype)


def empty_cache(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.zeros(shape[:-1], dtype=torch.float16)
    return torch.zeros(shape, dtype=torch.uint8), numbers, numbers.clone()


def cache_of(shape: Shape, room: int = 0, seed: int = 0) -> Cache:
    """Codes, scales and zeros of random keys and values, as views into storage that has ``room`` more tokens."""
    parts: list[Tensor] = []
    for dim, offset in ((shape.key_dim, 1.0), (shape.value_dim, 0.0)):
        channels = torch.randn(dim, generator=generator(seed + 7)) * offset
        states = (
            torch.randn(shape.batch, shape.kv_heads, shape.tokens + room, dim, generator=generator(seed)) + channels
        )
        parts += [part[:, :, : shape.tokens] for part in kv_ops.encode(states)]
        seed += 1
    return parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]


def query_of(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape.batch, shape.heads, shape.length, shape.key_dim, generator=generator(11)).to(dtype)


def assert_close_to_float64(got: Tensor, query: Tensor, cache: Cache, mask: Tensor | None) -> None:
    """Hold a result against float64, element by element, within what float32 and 24-bit fixed point can cost.

    With u = 2^-24, one rounding of a float32. A score is scale * (sum(q * code) - zero * sum(q)) * scaling: its parts
    are rounded at most 16 times between them (two sums put together of three, 10 additions for sum(q), the products),
    and each q was rounded to u * max|q| before. exp2 adds 8 u. An error e of score t moves the result by
    weight * e * (value - result). Weights are rounded to u of the heaviest in their tile of 32, and sums of values are
    rounded once per tile, per warp and per split. The result's own type rounds once on top.
    """
    u, scaling = 2.0**-24, query.shape[-1] ** -0.5
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = (part.double() for part in cache)
    batch, heads, length, dim = query.shape
    kv_heads, tokens = k_codes.shape[1:3]
    values = v_scale[..., None] * (v_codes - v_zero[..., None])
    rows = query.double().reshape(batch, kv_heads, -1, dim)
    centred = k_codes - k_zero[..., None]
    seen = kv_ops.visible(length, tokens, query.device) if mask is None else mask
    seen = seen.expand(batch, heads, length, tokens).reshape(batch, kv_heads, -1, tokens)
    step = scaling * k_scale[:, :, None]
    weights = (rows @ centred.mT * step).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    want = weights @ values

    size = rows.abs() @ k_codes.mT + rows.abs().sum(-1, keepdim=True) * k_zero.abs()[:, :, None]
    rounded = rows.abs().amax(-1, keepdim=True) * centred.abs().sum(-1)[:, :, None]
    error = weights * (u * step * (16 * size + rounded) + 8 * u)
    # sum of error * |value - want|, without a tensor of all tokens and elements: |a - b| <= |a| + |b|.
    allowed = error @ values.abs() + error.sum(-1, keepdim=True) * want.abs()
    allowed += 32 * u * values.abs().amax(-2, keepdim=True)
    parts = weights @ (v_scale[..., None] * (v_codes + v_zero.abs()[..., None]))
    allowed += (tokens / 32 + 16) * u * parts
    allowed = allowed.view(batch, heads, length, -1)
    want = want.view(batch, heads, length, -1)
    if got.dtype != torch.float32:
        allowed += torch.finfo(got.dtype).eps / 2 * want.abs() + torch.finfo(got.dtype).smallest_normal
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= allowed).all()


def attend(emulator: Emulator, query: Tensor, cache: Cache, mask: Tensor | None = None, splits: int = 1) -> Tensor:
    return emulator.attention(query, cache, mask, query.shape[-1] ** -0.5, splits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", DIMS.values(), ids=DIMS)
def test_append_stores_the_bits_of_the_reference(dim: int, dtype: torch.dtype, either_order: Emulator) -> None:
    states = states_of(2, 3, 5, dim, dtype=dtype)
    empty = empty_cache(2, 3, 9, dim)
    want = [tensor.clone() for tensor in empty]
    kv_ops.append_reference(want[0], want[1], want[2], states, 3)
    for got, expected in zip(either_order.append(*empty, states, 3), want, strict=True):
        # As numbers, so that a zero of either sign is the same.
        assert torch.equal(got, expected)


def test_append_reads_any_strides(emulator: Emulator) -> None:
    states = states_of(2, 6, 3, 64, dtype=torch.bfloat16).transpose(1, 2)  # [B, L, H, D] underneath
    empty = empty_cache(2, 3, 6, 64)
    codes, scale, zero = emulator.append(*empty, states, 0)
    want = kv_ops.encode(states)
    assert torch.equal(codes, want[0])
    assert torch.equal(scale, want[1])
    assert torch.equal(zero, want[2])


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 3e4, 1e38], ids=str)
def test_append_agrees_at_every_size_of_number(scale: float, emulator: Emulator) -> None:
    states = states_of(1, 2, 9, 64) * (scale / 10)
    states[..., 4, :] = scale + states[..., 4, :] * 1e-4  # hardly any spread around a large offset
    empty = empty_cache(1, 2, 9, 64)
    for got, expected in zip(emulator.append(*empty, states, 0), kv_ops.encode(states), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", DIMS.values(), ids=DIMS)
def test_dequantize_gives_the_bits_of_the_reference(dim: int, dtype: torch.dtype, either_order: Emulator) -> None:
    stored = kv_ops.encode(states_of(2, 3, 40, dim))
    codes, scale, zero = (part[:, :, :33] for part in stored)
    got = either_order.dequantize(codes, scale, zero, dtype)
    assert torch.equal(got, kv_ops.dequantize_reference(codes, scale, zero, dtype))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_is_exact_to_float32(shape: Shape, splits: int, emulator: Emulator) -> None:
    query, cache = query_of(shape), cache_of(shape)
    assert_close_to_float64(attend(emulator, query, cache, splits=splits), query, cache, None)


@pytest.mark.parametrize("name", ["multi_head", "groups_of_4", "256"])
def test_the_bound_notices_one_token_left_out(name: str, emulator: Emulator) -> None:
    shape = SHAPES[name]
    query, cache = query_of(shape), cache_of(shape)
    others = torch.ones(1, 1, 1, shape.tokens, dtype=torch.bool)
    others[..., shape.tokens // 2] = False
    with pytest.raises(AssertionError):
        assert_close_to_float64(attend(emulator, query, cache), query, cache, others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["groups_of_7", "256", "three_queries"])
def test_attention_takes_the_model_s_type(name: str, dtype: torch.dtype, emulator: Emulator) -> None:
    query, cache = query_of(SHAPES[name], dtype), cache_of(SHAPES[name])
    got = attend(emulator, query, cache, splits=2)
    assert got.dtype == dtype
    assert_close_to_float64(got, query, cache, None)


def test_attention_does_not_depend_on_the_order_threads_run_in(emulator: Emulator) -> None:
    shape = SHAPES["groups_of_7_three_queries"]
    query, cache = query_of(shape), cache_of(shape)
    forwards = attend(emulator, query, cache, splits=2)
    emulator.reverse(True)
    backwards = attend(emulator, query, cache, splits=2)
    emulator.reverse(False)
    assert torch.equal(forwards, backwards)


def test_attention_reads_a_cache_with_room_to_grow(emulator: Emulator) -> None:
    shape = Shape(2, 4, 2, 1, 45, 80, 64)
    query, cache = query_of(shape), cache_of(shape, room=11)
    assert not cache[0].is_contiguous()
    assert_close_to_float64(attend(emulator, query, cache), query, cache, None)


def left_padding(shape: Shape) -> Tensor:
    seen = kv_ops.visible(shape.length, shape.tokens, torch.device("cpu")).expand(shape.batch, 1, -1, -1).clone()
    for row in range(shape.batch):
        seen[row, :, :, : 40 * row] = False
    return seen


def random_mask(shape: Shape) -> Tensor:
    return torch.rand(shape.batch, shape.heads, shape.length, shape.tokens, generator=generator(3)) < 0.3


def shared_mask(shape: Shape) -> Tensor:
    return torch.rand(1, 1, shape.length, shape.tokens, generator=generator(4)) < 0.5


def transposed_mask(shape: Shape) -> Tensor:
    return (torch.rand(1, 1, shape.tokens, shape.length, generator=generator(4)) < 0.5).mT


@pytest.mark.parametrize("make", [left_padding, random_mask, shared_mask, transposed_mask], ids=lambda f: f.__name__)
def test_attention_sees_what_the_mask_says(make: object, emulator: Emulator) -> None:
    assert callable(make)
    shape = Shape(2, 6, 2, 3, 150, 64, 64)
    query, cache, mask = query_of(shape), cache_of(shape), make(shape)
    assert_close_to_float64(attend(emulator, query, cache, mask, splits=2), query, cache, mask)


def test_a_query_that_sees_nothing_gives_zeros(emulator: Emulator) -> None:
    shape = Shape(1, 4, 2, 2, 140, 64, 64)
    query, cache, mask = query_of(shape), cache_of(shape), random_mask(Shape(1, 4, 2, 2, 140, 64, 64))
    mask[:, 1, 0] = False
    got = attend(emulator, query, cache, mask, splits=2)
    assert not got[:, 1, 0].any()
    assert_close_to_float64(got, query, cache, mask)


def test_a_dominant_token_does_not_drown_the_others(emulator: Emulator) -> None:
    """Weights from 1 down to e^-12 in one tile: each keeps its own precision relative to the heaviest."""
    shape = Shape(1, 1, 1, 1, 96, 64, 64)
    query, cache = query_of(shape), cache_of(shape)
    assert_close_to_float64(attend(emulator, query * 3, cache), query * 3, cache, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_query_that_is_not_finite_spoils_its_own_row_only(bad: float, emulator: Emulator) -> None:
    shape = Shape(1, 4, 1, 1, 50, 64, 64)
    query, cache = query_of(shape), cache_of(shape)
    query[0, 2, 0, 5] = bad
    got = attend(emulator, query, cache)
    assert got[0, 2].isnan().all()
    assert got[0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("multiprocessors", [68, 108, 132, 148])
def test_splits_fill_the_gpu_and_leave_none_empty(multiprocessors: int, emulator: Emulator) -> None:
    few = emulator.splits(multiprocessors, batch=1, heads=28, kv_heads=4, length=1, tokens=32768, dim=128)
    assert 4 * few >= multiprocessors
    many = emulator.splits(multiprocessors, batch=64, heads=32, kv_heads=32, length=1, tokens=8192, dim=128)
    assert many <= 16
    for tokens in (1, 128, 129, 1000, 4097):
        splits = emulator.splits(multiprocessors, batch=1, heads=8, kv_heads=2, length=1, tokens=tokens, dim=64)
        each = -(-tokens // (splits * 128)) * 128
        assert (splits - 1) * each < tokens


FAULTS = {
    "mask_names_a_lane_that_left": (2, "names lane 5, which has left"),
    "barrier_for_part_of_the_block": (3, "__syncthreads is"),
    "write_past_the_end": (4, "thread 63: touches address"),
    "read_before_the_start": (5, "touches address"),
    "misaligned_vector": (6, "trapped by the sanitizer"),
}


@pytest.mark.parametrize(("which", "message"), FAULTS.values(), ids=FAULTS)
def test_the_emulator_catches(which: int, message: str, either_order: Emulator) -> None:
    with pytest.raises(EmulatorError) as caught:
        either_order.fault(which)
    assert message in str(caught.value)


def test_the_emulator_shows_a_missing_barrier_as_wrong_sums(either_order: Emulator) -> None:
    right = torch.full((64,), 63.0)
    assert torch.equal(either_order.fault(0), right)
    assert not torch.equal(either_order.fault(1), right)


def test_the_emulator_shows_a_missing_wait_for_a_copy(either_order: Emulator) -> None:
    right = torch.arange(64.0)
    assert torch.equal(either_order.fault(7), right)
    assert not torch.equal(either_order.fault(8), right)
