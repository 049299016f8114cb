"""Quantize and dequantize keys or values of the attention cache: the reference that every cache kernel must meet.

Plain torch on tensors [B, H, T, D], H = KV heads. No cache object, no model, no kernel lives here yet.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KVScheme = Literal["token", "qwen"]

LEVELS = 255
"""Steps between the lowest and the highest stored value of a uint8."""

MIN_RELATIVE_STEP = 2.0**-16
"""Smallest step as a share of the largest magnitude. It keeps ``zero_point`` under 2**16, where float32 still resolves
1/128 of a step, so that a nearly constant vector far from zero does not lose its values to cancellation."""


def quantize_cache_v(states: Tensor, *, scheme: KVScheme = "token") -> tuple[Tensor, Tensor, Tensor]:
    """Store keys or values as uint8: ``states`` is about ``scale * (quantized - zero_point)``.

    ``token`` gives every token of every head its own range and rounds to nearest, so what is stored for a token never
    depends on its neighbours or on how a prompt was split into calls, and no value is off by more than half a step.

    ``qwen`` is the scheme that the first Qwen models published, kept to compare against, with the defects it has:
    it truncates, which biases every value down by half a step on average; one range serves all tokens of the call; the
    range lives in the dtype of ``states``; and a constant input divides by zero, which dequantizes to NaN.

    Args:
        states: [B, H, T, D], any float dtype, finite. Read, never written.
        scheme: whose range a value is rounded in, and how.

    Returns:
        quantized: [B, H, T, D] uint8.
        scale: [B, H, T, 1] float32 (``token``, always positive) or the dtype of ``states`` (``qwen``).
        zero_point: [B, H, T, 1], dtype of ``scale``: the real, unrounded level that stands for 0.0.

    Raises:
        ValueError: ``states`` is not a float tensor of four dimensions, or the scheme is unknown.

    Source: ``qwen`` follows the formula of Qwen's own cache quantization, Qwen-7B ``modeling_qwen.py`` (2023).
    """
    if states.dim() != 4 or not states.is_floating_point():
        raise ValueError(f"states must be a float tensor [B, H, T, D], got {states.dtype} {list(states.shape)}")
    if scheme == "token":
        return _quantize_per_token(states)
    if scheme == "qwen":
        return _quantize_as_qwen(states)
    raise ValueError(f"scheme must be 'token' or 'qwen', got {scheme!r}")


def dequantize_cache_torch(quantized: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Recover the values of either scheme: ``scale * (quantized - zero_point)``.

    Args:
        quantized: [B, H, T, D] uint8. Read, never written.
        scale: [B, H, T, 1], any float dtype.
        zero_point: [B, H, T, 1], dtype of ``scale``.

    Returns:
        [B, H, T, D] in the dtype of ``scale``.
    """
    return scale * (quantized.to(scale.dtype) - zero_point)


def _quantize_per_token(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One range per token and head over D, rounded to nearest."""
    values = states.float()
    low, high = values.aminmax(dim=-1, keepdim=True)
    # Divided before subtracting: the difference of the two ends may overflow where neither end does.
    step = high / LEVELS - low / LEVELS
    largest = torch.maximum(high, -low)
    # An all-zero vector has no magnitude either; any positive step stores it exactly.
    scale = torch.maximum(step, largest * MIN_RELATIVE_STEP).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = -low / scale
    quantized = (values / scale + zero_point).round().clamp(0, LEVELS).to(torch.uint8)
    return quantized, scale, zero_point


def _quantize_as_qwen(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One range per head over all tokens of this call, truncated, in the dtype of ``states``."""
    batch, heads, tokens, _ = states.shape
    if states.numel() == 0:
        empty = states.new_empty(batch, heads, tokens, 1)
        return torch.empty_like(states, dtype=torch.uint8), empty, empty.clone()
    # Over T and D together: [B, H, 1, 1].
    low = states.amin(dim=(2, 3), keepdim=True)
    high = states.amax(dim=(2, 3), keepdim=True)
    scale = (high - low) / LEVELS
    zero_point = 0 - low / scale
    quantized = (states / scale + zero_point).clamp(0, LEVELS).to(torch.uint8)
    return quantized, scale.expand(-1, -1, tokens, -1).contiguous(), zero_point.expand(-1, -1, tokens, -1).contiguous()
