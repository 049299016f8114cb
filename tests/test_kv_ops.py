"""The Int8 KV cache's operators: references against their formulas, CPU kernels against the references.

Run as a program, it checks the kernels of the instruction set that QQUANT_CPU_ISA names and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qquant import _native, kv_ops
from tests.isa_runs import Outcome, run_for_each

LIVE = any(module.live for module in _native.status() if module.name == "qquant._C")
needs_kernels = pytest.mark.skipif(not LIVE, reason="the CPU kernels (qquant._C) are not built")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to a dtype once."""

NAN_WITH_LOW_BITS = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32).item()
"""A kernel that adds to exponents as integers could turn it into a number."""

STATES = {
    "decode": (1, 2, 1, 128),
    "prefill": (2, 2, 37, 128),
    "odd_head_size": (1, 3, 5, 83),
    "head_of_one": (1, 2, 3, 1),
    "head_of_256": (1, 1, 19, 256),
    "large_batch": (256, 1, 1, 8),
    "no_tokens": (1, 2, 0, 64),
    "no_batch": (0, 2, 3, 64),
}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_states(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Vectors as models make them and as they should not: large, tiny, one-sided, constant, zero."""
    states = seeded(*shape)
    extremes = torch.tensor([1.0, 1e-3, 1e4, 1e-7, 0.0])
    states = states * extremes[torch.arange(shape[2]) % 5, None] + (torch.arange(shape[2]) % 3 == 1)[:, None] * 7.5
    return states.to(dtype)


def storage(shape: tuple[int, ...], room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cache storage for ``room`` tokens, filled with what must survive."""
    batch, heads, _, size = shape
    numbers = torch.full((batch, heads, room), 3.0, dtype=torch.float16)
    return torch.full((batch, heads, room, size), 77, dtype=torch.uint8), numbers, numbers.clone()


def check_append(states: Tensor, at: int = 3) -> None:
    """Kernel and reference leave the same bits everywhere, those outside the written tokens included."""
    room = states.shape[2] + 7
    expected, got = storage(states.shape, room), storage(states.shape, room)
    kv_ops.append_reference(*expected, states, at)
    kv_ops.append(*got, states, at)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


def check_dequantize(states: Tensor, dtype: torch.dtype) -> None:
    codes, scale, zero = storage(states.shape, states.shape[2] + 7)
    kv_ops.append_reference(codes, scale, zero, states, 2)
    codes, scale, zero = (x.narrow(2, 2, states.shape[2]) for x in (codes, scale, zero))
    got = kv_ops.dequantize(codes, scale, zero, dtype)
    assert got.is_contiguous()
    assert torch.equal(got, kv_ops.dequantize_reference(codes, scale, zero, dtype))


@dataclass(frozen=True)
class Case:
    """One attention problem: ``group`` query heads for each of ``heads`` KV heads, ``queries`` of ``tokens`` asked."""

    batch: int = 2
    heads: int = 2
    group: int = 1
    queries: int = 1
    tokens: int = 300
    k_size: int = 64
    v_size: int = 64
    dtype: torch.dtype = torch.float32
    mask: str = ""


CASES = {
    "decode": Case(),
    "decode_of_128": Case(k_size=128, v_size=128, tokens=1100, dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "gqa2": Case(group=2, k_size=128, v_size=128),
    "gqa7": Case(group=7, tokens=257, dtype=torch.bfloat16),
    "mqa": Case(heads=1, group=40, tokens=130),
    "odd_head_size": Case(k_size=83, v_size=83, group=3, tokens=67),
    "odd_head_size_alone": Case(k_size=83, v_size=83, tokens=67),
    "head_of_80": Case(k_size=80, v_size=80),
    "head_of_192": Case(batch=1, k_size=192, v_size=192),
    "head_of_256": Case(batch=1, k_size=256, v_size=256),
    "head_beyond_256": Case(batch=1, k_size=321, v_size=321, tokens=33),
    "other_value_size": Case(k_size=192, v_size=128, group=2),
    "wider_value_size": Case(k_size=24, v_size=40),
    "odd_tokens": Case(tokens=511),
    "one_token": Case(tokens=1),
    "three_tokens": Case(tokens=3, group=4),
    "several_splits": Case(batch=1, heads=1, tokens=2500),
    "several_splits_gqa": Case(batch=1, heads=1, group=6, tokens=2049, mask="left_padding"),
    "left_padding": Case(batch=3, tokens=700, mask="left_padding"),
    "fully_masked_row": Case(batch=3, mask="nothing_seen"),
    "per_head_mask": Case(group=2, mask="per_head"),
    "mask_expanded_over_heads": Case(group=2, queries=3, mask="expanded"),
    "mask_with_strided_tokens": Case(queries=2, mask="strided"),
    "multi_query": Case(queries=5, group=2, tokens=259),
    "multi_query_all_new": Case(queries=40, tokens=40, group=2),
    "multi_query_with_mask": Case(queries=5, tokens=259, mask="per_head"),
    "large_batch": Case(batch=256, heads=1, tokens=3, k_size=8, v_size=8),
    "no_batch": Case(batch=0),
    "no_queries": Case(queries=0),
    "no_tokens": Case(queries=0, tokens=0),
}


def cache_view(case: Case, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Part of a larger cache: more batch entries and tokens in storage than asked for."""
    states = seeded(case.batch + 1, case.heads, case.tokens + 5, size, seed=seed)
    states = states * (1 + seeded(size, seed=seed + 1).abs()) + 2 * seeded(size, seed=seed + 2)
    views = [x.narrow(0, 1, case.batch).narrow(2, 2, case.tokens) for x in kv_ops.encode(states)]
    return views[0], views[1], views[2]


def mask_of(case: Case) -> Tensor | None:
    if not case.mask:
        return None
    heads = case.heads * case.group
    shape = (case.batch, heads if case.mask == "per_head" else 1, case.queries, case.tokens)
    mask = seeded(*shape, seed=9) > -0.5
    if case.mask == "left_padding":
        for entry in range(case.batch):
            mask[entry] = torch.arange(case.tokens) >= 290 * entry
    elif case.mask == "nothing_seen":
        mask[1] = False
    elif case.mask == "expanded":
        mask = mask.expand(-1, heads, -1, -1)
    elif case.mask == "strided":
        mask = mask.mT.contiguous().mT
    return mask


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(case: Case) -> Arguments:
    """Arguments of ``kv_ops.decode_attention`` but the scaling; the query is a transposed view, as models pass it."""
    query = seeded(case.batch, case.queries, case.heads * case.group, case.k_size).to(case.dtype).transpose(1, 2)
    return query, *cache_view(case, case.k_size, 3), *cache_view(case, case.v_size, 6)


def oracle_and_bound(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention in float64, and how far a kernel may be from it.

    The bound adds up, each as its worst case: query and weights rounded to fixed point; exp2 by polynomial; every
    float32 rounding; and the result rounded to its dtype.
    """
    _, heads, length, size = query.shape
    group, tokens = heads // keys[0].shape[1], keys[0].shape[2]
    unit, slack = 2.0**-24, 0.51  # half a fixed-point step, and the float32 roundings of x * (steps / largest)
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = (
        x.double().repeat_interleave(group, 1) for x in (*keys, *values)
    )
    k = k_scale[..., None] * (k_codes - k_zero[..., None])
    v_steps = v_codes - v_zero[..., None]
    v = v_scale[..., None] * v_steps
    q = query.double() * scaling
    scores = q @ k.mT  # [B, Hq, L, T]
    seen = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length) if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # a row without keys
    out = weights @ v

    # Scores: a fixed-point step of the query for every key element; nine roundings of terms no larger than the sum
    # of |q| * (255 + |zero|) * scale.
    step = q.abs().amax(-1, keepdim=True) / min(32639, (2**31 - 1) // (255 * size))
    largest_term = (q.abs().sum(-1, keepdim=True) + size * step) * (k_scale * (255 + k_zero.abs()))[:, :, None]
    score_error = slack * step * k.abs().sum(-1)[:, :, None] + 9 * unit * largest_term
    peak = torch.nan_to_num(scores.abs(), posinf=0.0).amax(-1, keepdim=True)
    # Weights: exp2 within 4 units, and up to 8 roundings per chunk of 256 tokens; their total sums 256 of them in turn.
    chunks = tokens / 256 + 2
    weight_error = torch.expm1(score_error + 4 * unit * peak) + unit * (264 + 8 * chunks)
    bound = (weights * weight_error) @ v.abs() + (weights * weight_error).sum(-1, keepdim=True) * out.abs()
    # Weights times v_scale: rounded to 32639 steps of the largest of their chunk, which is at most that of the row.
    step = (weights * v_scale[:, :, None]).amax(-1, keepdim=True) / 32639
    bound += slack * step * (seen.double().expand(scores.shape) @ v_steps.abs())
    largest_value = (weights * (v_scale * (255 + v_zero.abs()))[:, :, None]).sum(-1, keepdim=True)
    bound += unit * (264 + 8 * chunks) * largest_value
    rounding = UNIT[query.dtype] * (out.abs() + bound) + 2.0**-25  # float16 counts in steps of 2**-24 near zero
    return out, 1.01 * bound + rounding  # 1 %: products of two errors


def check_attention(case: Case) -> None:
    query, *cache = arguments(case)
    mask, scaling = mask_of(case), case.k_size**-0.5
    got = kv_ops.decode_attention(query, *cache, mask, scaling)
    assert got.shape == (*query.shape[:3], case.v_size)
    assert got.dtype == query.dtype
    if got.numel() == 0:
        return
    expected, bound = oracle_and_bound(query, tuple(cache[:3]), tuple(cache[3:]), mask, scaling)
    assert ((got.double() - expected).abs() <= bound).all(), float(((got.double() - expected).abs() / bound).max())
    if case.mask == "nothing_seen":
        assert (got[1] == 0).all()


def check_kernels() -> None:
    """Every check of this file that an instruction set could break."""
    for shape in STATES.values():
        for dtype in DTYPES.values():
            states = some_states(shape, dtype)
            check_append(states)
            check_append(states.transpose(1, 2).contiguous().transpose(1, 2))
            check_dequantize(states, dtype)
    for case in CASES.values():
        check_attention(case)


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("shape", list(STATES.values()), ids=list(STATES))
def test_append_stores_the_bits_of_the_reference_and_leaves_the_rest(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_append(some_states(shape, dtype))


@needs_kernels
def test_append_takes_states_as_a_projection_leaves_them() -> None:
    check_append(some_states((2, 37, 4, 64), torch.bfloat16).transpose(1, 2))


@needs_kernels
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -7.25, 65_504.0, 1e-30, 3e38, -3e38])
def test_append_of_a_constant_is_that_of_the_reference(value: float) -> None:
    check_append(torch.full((1, 1, 3, 72), value))


@needs_kernels
def test_every_float16_is_encoded_and_decoded_as_by_the_reference() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = torch.where(every.isfinite(), every, 0).reshape(1, 1, -1, 16)
    spread = torch.cat([finite, finite.flip(2)], -1)
    check_append(finite)
    check_append(spread)
    for dtype in DTYPES.values():
        check_dequantize(spread, dtype)


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_state_that_is_not_finite_harms_only_its_own_vector(bad: float) -> None:
    states = some_states((1, 2, 20, 64), torch.float32)
    spoiled = states.clone()
    spoiled[0, 1, 4, 5] = bad
    clean, harmed = storage(states.shape, 20), storage(states.shape, 20)
    kv_ops.append(*clean, states, 0)
    kv_ops.append(*harmed, spoiled, 0)
    others = torch.ones(1, 2, 20, dtype=torch.bool)
    others[0, 1, 4] = False
    for one, other in zip(clean, harmed, strict=True):
        assert torch.equal(one[others], other[others])


@needs_kernels
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("shape", list(STATES.values()), ids=list(STATES))
def test_dequantize_gives_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_dequantize(some_states(shape, torch.float32), dtype)


@needs_kernels
def test_attention_is_within_the_derived_bound(case: Case) -> None:
    check_attention(case)


@needs_kernels
def test_scores_of_thousands_neither_overflow_nor_drown_the_other_keys() -> None:
    query, *cache = arguments(Case(tokens=600))
    query = query * 1000
    expected, bound = oracle_and_bound(query, tuple(cache[:3]), tuple(cache[3:]), None, 1.0)
    got = kv_ops.decode_attention(query, *cache, None, 1.0)
    assert got.isfinite().all()
    # Weights are off by a factor of exp(error of the score) here, so only rows with one clear winner tell anything.
    clear = bound < 0.1
    assert ((got.double() - expected).abs() <= bound)[clear].all()


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, NAN_WITH_LOW_BITS, torch.inf], ids=["nan", "nan_with_low_bits", "inf"])
def test_a_query_that_is_not_finite_gives_nan_in_its_own_row_only(bad: float) -> None:
    query, *cache = arguments(Case(group=4))
    clean = kv_ops.decode_attention(query, *cache, None, 0.125)
    query[1, 2, 0, 7] = bad
    got = kv_ops.decode_attention(query, *cache, None, 0.125)
    assert got[1, 2].isnan().all()
    others = torch.ones(2, 8, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(got[others], clean[others])


@needs_kernels
def test_attention_is_the_same_for_one_thread_and_two(case: Case, two_threads: None) -> None:
    query, *cache = arguments(case)
    both = kv_ops.decode_attention(query, *cache, mask_of(case), 0.1)
    torch.set_num_threads(1)
    assert torch.equal(both, kv_ops.decode_attention(query, *cache, mask_of(case), 0.1))


@needs_kernels
def test_append_and_dequantize_are_the_same_for_one_thread_and_two(two_threads: None) -> None:
    states = some_states((2, 3, 700, 128), torch.bfloat16)
    check_append(states)
    check_dequantize(states, torch.bfloat16)


@pytest.mark.parametrize("mask", ["", "per_head"])
def test_operators_are_well_formed(mask: str) -> None:
    states = some_states((2, 2, 5, 16), torch.bfloat16)
    codes, scale, zero = storage(states.shape, 9)
    torch.library.opcheck(kv_ops.append.default, (codes, scale, zero, states, 2))
    torch.library.opcheck(kv_ops.dequantize.default, (codes, scale, zero, torch.float16))
    case = Case(group=2, queries=2, tokens=20, k_size=16, v_size=24, mask=mask)
    torch.library.opcheck(kv_ops.decode_attention.default, (*arguments(case), mask_of(case), 0.25))


BAD_APPEND: dict[str, tuple[dict[str, Any], str]] = {
    "states_of_another_size": ({"states": torch.zeros(1, 2, 3, 8)}, "states must be"),
    "states_of_integers": ({"states": torch.zeros(1, 2, 3, 16, dtype=torch.int32)}, "must be float32, float16 or"),
    "states_with_a_strided_axis": ({"states": torch.zeros(1, 2, 16, 3).mT}, "side by side in memory"),
    "codes_of_int8": ({"codes": torch.zeros(1, 2, 9, 16, dtype=torch.int8)}, "codes must be uint8"),
    "scale_of_float32": ({"scale": torch.zeros(1, 2, 9)}, "scale must be float16"),
    "scale_of_other_tokens": ({"scale": torch.zeros(1, 2, 8, dtype=torch.float16)}, "scale must have the first three"),
    "scale_with_a_strided_axis": ({"scale": torch.zeros(1, 9, 2, dtype=torch.float16).mT}, "side by side in memory"),
    "before_the_start": ({"at": -1}, "must fit into the cache's room of 9"),
    "past_the_end": ({"at": 7}, "must fit into the cache's room of 9"),
}


@needs_kernels
@pytest.mark.parametrize("name", list(BAD_APPEND))
def test_append_says_what_is_wrong(name: str) -> None:
    change, message = BAD_APPEND[name]
    codes, scale, zero = storage((1, 2, 3, 16), 9)
    given = {"codes": codes, "scale": scale, "zero": zero, "states": torch.zeros(1, 2, 3, 16), "at": 0, **change}
    with pytest.raises(RuntimeError, match=message):
        kv_ops.append(*given.values())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=["float64", "int8"])
def test_dequantize_says_which_dtypes_it_makes(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16"):
        kv_ops.dequantize(*storage((1, 2, 3, 16), 9), dtype)


BAD_ATTENTION = {
    "query_of_another_size": (0, torch.zeros(2, 4, 1, 32), "does not fit the query"),
    "query_heads_that_do_not_divide": (0, torch.zeros(2, 3, 1, 64), "cannot share 2 KV heads evenly"),
    "more_queries_than_keys": (0, torch.zeros(2, 4, 21, 64), "21 queries need at least as many keys"),
    "query_of_float64": (0, torch.zeros(2, 4, 1, 64, dtype=torch.float64), "query must be float32, float16 or"),
    "query_with_a_strided_axis": (0, torch.zeros(2, 4, 64, 3).mT, "side by side in memory"),
    "values_of_other_tokens": (4, torch.zeros(2, 2, 21, 64, dtype=torch.uint8), "does not fit the query"),
    "zero_of_float32": (6, torch.zeros(2, 2, 20), "v_zero must be float16"),
    "mask_of_other_tokens": (7, torch.ones(2, 1, 1, 19, dtype=torch.bool), "mask must be"),
    "mask_of_float": (7, torch.zeros(2, 1, 1, 20), "mask must be bool"),
}


@needs_kernels
@pytest.mark.parametrize("name", list(BAD_ATTENTION))
def test_attention_says_what_is_wrong(name: str) -> None:
    place, value, message = BAD_ATTENTION[name]
    given: list[Tensor | None] = [*arguments(Case(group=2, tokens=20)), None]
    given[place] = value
    with pytest.raises(RuntimeError, match=message):
        kv_ops.decode_attention(*given, 0.1)


@pytest.fixture(scope="module")
def runs() -> dict[str, Outcome]:
    """The checks of this file under every instruction set that this file's kernels have, and under one there is not."""
    code = "import torch; from tests import test_kv_ops as t; print(torch.ops.qquant.cpu_kernel_info()); "
    return run_for_each(["portable", "avx2", "avx512", "avx512_vnni", "sse9"], code + "t.check_kernels()")


@needs_kernels
@pytest.mark.slow  # starts an interpreter and imports torch
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_every_instruction_set_passes_the_same_checks(runs: dict[str, Outcome], isa: str) -> None:
    assert runs[isa].returncode == 0, runs[isa].said
    if f"kv_append: {isa}," not in runs[isa].said:
        pytest.skip(f"this processor has no {isa}")


@needs_kernels
@pytest.mark.slow  # starts an interpreter and imports torch
def test_an_unknown_instruction_set_is_refused(runs: dict[str, Outcome]) -> None:
    names = "portable, avx2, avx512, avx512_vnni, avx512_bf16"
    assert runs["sse9"].returncode == 1
    assert f"QQUANT_CPU_ISA must be one of {names}, got 'sse9'" in runs["sse9"].said


@pytest.mark.parametrize("name", ["decode", "gqa7", "left_padding", "multi_query", "other_value_size"])
def test_the_reference_is_torch_attention_on_dequantized_values(name: str) -> None:
    case = CASES[name]
    query, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = given = arguments(case)
    mask = mask_of(case)
    keys = kv_ops.decode(k_codes, k_scale, k_zero, torch.float64)
    values = kv_ops.decode(v_codes, v_scale, v_zero, torch.float64)
    seen = kv_ops.visible(case.queries, case.tokens, query.device) if mask is None else mask
    expected = scaled_dot_product_attention(query.double(), keys, values, attn_mask=seen, scale=0.1, enable_gqa=True)
    got = kv_ops.attention_reference(*given, mask, 0.1)
    # float32 sums of at most 192 and 700 terms, exp of scores below 32, then one rounding to the query's dtype.
    tolerance = (192 + 700 + 32) * 2.0**-24 + UNIT[case.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_reference_gives_zeros_where_nothing_is_seen() -> None:
    case = CASES["fully_masked_row"]
    assert (kv_ops.attention_reference(*arguments(case), mask_of(case), 0.1)[1] == 0).all()


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_the_reference_stores_every_element_within_half_a_step(dtype: torch.dtype) -> None:
    states = some_states((2, 2, 37, 128), dtype)
    codes, scale, zero = kv_ops.encode(states)
    error = (kv_ops.decode(codes, scale, zero, torch.float64) - states.double()).abs()
    # Half a step for the code, half for the float16 zero (at most 2048, where it counts in ones), and float32 rounding
    # of codes up to 2304 and of products.
    assert (error <= (1.0 + 4 * 2304 * 2.0**-24) * scale.double()[..., None]).all()
