"""Quantized keys and values against the bound, and the published scheme against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qquant.kv_cache_quant import dequantize_cache_torch, quantize_cache_v
from qquant.kv_ops import MIN_RELATIVE_STEP
from qquant.kv_store import KVScheme

SHAPES = {"decode": (1, 2, 1, 128), "prefill": (2, 2, 37, 128), "odd_head_dim": (1, 3, 5, 80), "empty": (1, 2, 0, 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# x / scale and zero are below 2**11 + 255 and round three times in float32, 3 * 2**12 * 2**-24 steps, and less after.
HALF_STEP = 0.5 + 0.001


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def states(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


def round_trip(states: Tensor, scheme: KVScheme = "token") -> tuple[Tensor, Tensor]:
    quantized, scale, zero_point = quantize_cache_v(states, scheme=scheme)
    return dequantize_cache_torch(quantized, scale, zero_point), scale


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0, 60_000.0])
def test_error_is_at_most_half_a_step(states: Tensor, offset: float, dtype: torch.dtype) -> None:
    states = (states + offset).to(dtype)
    restored, scale = round_trip(states)
    assert ((restored - states.float()).abs() <= HALF_STEP * scale).all()


def test_results_have_the_documented_shapes_and_dtypes(states: Tensor) -> None:
    quantized, scale, zero_point = quantize_cache_v(states.bfloat16())
    per_token = (*states.shape[:3], 1)
    assert quantized.shape == states.shape
    assert quantized.dtype == torch.uint8
    assert scale.shape == zero_point.shape == per_token
    assert scale.dtype == zero_point.dtype == torch.float16


def test_what_is_stored_for_a_token_ignores_its_neighbours(states: Tensor) -> None:
    together = quantize_cache_v(states)
    for t in range(states.shape[2]):
        alone = quantize_cache_v(states[:, :, t : t + 1])
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[:, :, t : t + 1], part)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.25, 65_504.0, 8e6, 1e-30])
def test_a_constant_input_comes_back(value: float) -> None:
    states = torch.full((1, 2, 3, 64), value)
    restored, scale = round_trip(states)
    assert (scale > 0).all()
    # The guard makes a step one part in 2048, rounded up to float16, of which half may be lost; tiny values stay tiny.
    torch.testing.assert_close(restored, states, rtol=HALF_STEP * MIN_RELATIVE_STEP * 1.001, atol=2.0**-25)


def test_values_beyond_what_float16_steps_reach_are_clamped() -> None:
    states = torch.tensor([-3e38, 3e38, 0.0, 1e5]).reshape(1, 1, 1, 4)
    restored, scale = round_trip(states)
    assert scale.item() == 65504.0
    assert restored.isfinite().all()


def test_zero_point_is_never_coarser_than_half_a_step() -> None:
    nearly_constant = 1000 + 1e-3 * torch.rand(1, 1, 4, 64, generator=torch.Generator().manual_seed(1))
    _, scale, zero_point = quantize_cache_v(nearly_constant)
    assert (zero_point.abs() <= 1 / MIN_RELATIVE_STEP).all()
    assert (scale >= nearly_constant.amax() * MIN_RELATIVE_STEP * 0.999).all()


def test_input_is_not_written(states: Tensor) -> None:
    before = states.clone()
    quantize_cache_v(states)
    quantize_cache_v(states, scheme="qwen")
    assert torch.equal(states, before)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_qwen_scheme_follows_its_formula_head_by_head(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 11, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    quantized, scale, zero_point = quantize_cache_v(states, scheme="qwen")
    assert scale.shape == zero_point.shape == (2, 3, 11, 1)
    assert scale.dtype == zero_point.dtype == dtype
    for b in range(2):
        for h in range(3):
            x = states[b, h]
            s = (x.max() - x.min()) / 255
            z = 0 - x.min() / s
            assert (scale[b, h] == s).all()
            assert (zero_point[b, h] == z).all()
            assert torch.equal(quantized[b, h], torch.clamp(x / s + z, 0, 255).to(torch.uint8))


def test_qwen_scheme_truncates_so_it_is_half_a_step_low_on_average() -> None:
    states = torch.rand(1, 1, 256, 128, generator=torch.Generator().manual_seed(3))
    restored, scale = round_trip(states, "qwen")
    # 32,768 uniform remainders: their mean strays from 1/2 by far less than 0.02.
    assert abs(((restored - states) / scale).mean().item() + 0.5) < 0.02


def test_qwen_scheme_turns_a_constant_input_into_nan() -> None:
    restored, _ = round_trip(torch.ones(1, 1, 2, 8), "qwen")
    assert restored.isnan().all()


def test_qwen_scheme_takes_an_empty_call() -> None:
    quantized, scale, _ = quantize_cache_v(torch.empty(1, 2, 0, 64), scheme="qwen")
    assert quantized.shape == (1, 2, 0, 64)
    assert scale.shape == (1, 2, 0, 1)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 4), torch.zeros(1, 1, 1, 4, dtype=torch.int8)], ids=["three_dims", "integers"]
)
def test_a_wrong_input_is_named(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"states must be a float tensor \[B, H, T, D\]"):
        quantize_cache_v(bad)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="'channel'"):
        quantize_cache_v(torch.zeros(1, 1, 1, 4), scheme="channel")  # type: ignore[arg-type]
