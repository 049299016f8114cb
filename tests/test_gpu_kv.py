"""The KV cache's operators on a GPU: against the references, on streams, in graphs, and on memory that was used before.

Skipped without a GPU; tests/test_cuda_logic.py runs the same kernels on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant import _native, kv_ops
from tests.test_cuda_logic import (
    DIMS,
    DTYPES,
    SHAPES,
    Cache,
    Shape,
    assert_close_to_float64,
    cache_of,
    left_padding,
    query_of,
    random_mask,
    shared_mask,
    states_of,
)

pytestmark = pytest.mark.gpu

MORE_SHAPES = SHAPES | {
    "qwen_7b": Shape(2, 32, 32, 1, 4099, 128, 128),
    "qwen2.5_7b": Shape(4, 28, 4, 1, 2050, 128, 128),
    "batch_256": Shape(256, 4, 2, 1, 190, 64, 64),
    "long": Shape(1, 8, 2, 2, 20_001, 128, 128),
}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Fail, and not pass by way of the reference, where the module is missing."""
    _native.load_torch_ops()
    [state] = [state for state in _native.status() if state.name == "qquant._C_cuda"]
    assert state.live, f"qquant._C_cuda is not here: {state.why}"


def on_gpu(cache: Cache) -> Cache:
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = (part.cuda() for part in cache)
    return k_codes, k_scale, k_zero, v_codes, v_scale, v_zero


def attend(query: Tensor, cache: Cache, mask: Tensor | None = None) -> Tensor:
    out: Tensor = kv_ops.decode_attention(query, *cache, mask, query.shape[-1] ** -0.5)
    return out


def empty_cache(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = shape[:-1]
    return (
        torch.full(shape, 7, dtype=torch.uint8, device="cuda"),
        torch.full(numbers, torch.nan, dtype=torch.float16, device="cuda"),
        torch.full(numbers, torch.nan, dtype=torch.float16, device="cuda"),
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", DIMS.values(), ids=DIMS)
def test_append_stores_the_bits_of_the_cpu(dim: int, dtype: torch.dtype) -> None:
    states = states_of(2, 3, 33, dim, dtype=dtype)
    cache = empty_cache(2, 3, 40, dim)
    kv_ops.append(*cache, states.cuda(), 5)
    for got, want in zip(cache, kv_ops.encode(states), strict=True):
        assert torch.equal(got[:, :, 5:38].cpu(), want)
        assert torch.equal(got[:, :, :5], torch.full_like(got[:, :, :5], 7)) or got[:, :, :5].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", DIMS.values(), ids=DIMS)
def test_dequantize_gives_the_bits_of_the_cpu(dim: int, dtype: torch.dtype) -> None:
    codes, scale, zero = (part[:, :, :33] for part in kv_ops.encode(states_of(2, 3, 40, dim)))
    got = kv_ops.dequantize(codes.cuda(), scale.cuda(), zero.cuda(), dtype)
    assert torch.equal(got.cpu(), kv_ops.dequantize_reference(codes, scale, zero, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", MORE_SHAPES.values(), ids=MORE_SHAPES)
def test_attention_is_exact_to_float32(shape: Shape, dtype: torch.dtype) -> None:
    query, cache = query_of(shape, dtype).cuda(), on_gpu(cache_of(shape, room=3))
    assert_close_to_float64(attend(query, cache), query, cache, None)


@pytest.mark.parametrize("make", [left_padding, random_mask, shared_mask], ids=lambda f: f.__name__)
def test_attention_sees_what_the_mask_says(make: object) -> None:
    assert callable(make)
    shape = Shape(3, 14, 2, 3, 1001, 128, 128)
    query, cache, mask = query_of(shape).cuda(), on_gpu(cache_of(shape)), make(shape).cuda()
    assert_close_to_float64(attend(query, cache, mask), query, cache, mask)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    shape = Shape(1, 4, 2, 1, 300, 64, 64)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device="cuda")
    assert not attend(query_of(shape).cuda(), on_gpu(cache_of(shape)), mask).any()


def test_the_same_call_gives_the_same_bits() -> None:
    """A result that moves between runs is a race."""
    shape = Shape(8, 28, 4, 1, 4097, 128, 128)
    query, cache = query_of(shape, torch.bfloat16).cuda(), on_gpu(cache_of(shape))
    first = attend(query, cache)
    for _ in range(50):
        assert torch.equal(attend(query, cache), first)


def test_work_runs_on_the_current_stream() -> None:
    shape = Shape(4, 8, 8, 1, 2048, 128, 128)
    query, cache = query_of(shape).cuda(), on_gpu(cache_of(shape))
    want = attend(query, cache)
    late = torch.zeros_like(query)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        late.copy_(query)
        got = attend(late, cache)
    stream.synchronize()
    assert torch.equal(got, want)


def test_a_graph_can_be_captured_and_replayed() -> None:
    shape = Shape(2, 8, 2, 1, 513, 128, 128)
    query, cache = query_of(shape, torch.bfloat16).cuda(), on_gpu(cache_of(shape))
    new_keys = states_of(2, 2, 1, 128, dtype=torch.bfloat16).cuda()
    attend(query, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_ops.append(*cache[:3], new_keys, 512)
        out = attend(query, cache)
    query.copy_(query_of(shape, torch.bfloat16).flip(-1))
    new_keys.copy_(new_keys.flip(-1))
    graph.replay()
    torch.cuda.synchronize()
    codes = kv_ops.encode(new_keys.cpu())[0]
    assert torch.equal(cache[0][:, :, 512:].cpu(), codes)
    assert torch.equal(out, attend(query, cache))
    assert_close_to_float64(out, query, cache, None)


def test_memory_that_was_used_before_does_not_show() -> None:
    shape = Shape(2, 8, 2, 1, 777, 128, 128)
    query, cache = query_of(shape).cuda(), on_gpu(cache_of(shape))
    want = attend(query, cache)
    for _ in range(3):
        garbage = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20)]
        torch.cuda.synchronize()
        del garbage  # the allocator hands it out again for the workspace and the result
        assert torch.equal(attend(query, cache), want)


@pytest.mark.parametrize("name", ["kv_append", "kv_dequantize", "kv_decode_attention"])
def test_operators_are_well_formed(name: str) -> None:
    shape = Shape(1, 4, 2, 1, 40, 64, 64)
    cache = on_gpu(cache_of(shape))
    arguments: dict[str, tuple[object, ...]] = {
        "kv_append": (*empty_cache(1, 2, 8, 64), states_of(1, 2, 3, 64).cuda(), 2),
        "kv_dequantize": (*cache[:3], torch.bfloat16),
        "kv_decode_attention": (query_of(shape).cuda(), *cache, None, 0.125),
    }
    torch.library.opcheck(getattr(torch.ops.qquant, name).default, arguments[name])


def test_a_head_size_that_no_kernel_takes_is_refused_with_the_way_out() -> None:
    shape = Shape(1, 1, 1, 1, 9, 20, 20)
    with pytest.raises(RuntimeError, match=r"heads of 8, 16, \.\.\. 256 elements .* got 20; QQUANT_NATIVE=0"):
        attend(query_of(shape).cuda(), on_gpu(cache_of(shape)))


def test_tensors_on_two_devices_are_refused() -> None:
    shape = Shape(1, 1, 1, 1, 9, 64, 64)
    cache = on_gpu(cache_of(shape))
    with pytest.raises(RuntimeError, match="must be on the device of the others"):
        kv_ops.decode_attention(query_of(shape).cuda(), *cache[:3], *cache_of(shape)[3:], None, 0.125)
