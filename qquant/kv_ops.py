"""The operators of the Int8 KV cache: append, dequantize, decode attention. Schema, reference and fake of each.

The references are plain torch, run on every device, and are what the kernels of csrc/ must meet. Importing this file
loads those kernels where they are built. No cache object and no model live here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qquant import _native

KVBits = Literal[8, 4]
"""Width of one stored code."""

LEVELS = 255
"""Steps between the lowest and the highest stored value of a uint8."""

INT4_GROUP = 32
"""Channels that share a range where values are stored in 4 bits."""

MIN_RELATIVE_STEP = 2.0**-11
"""Smallest step as a share of a vector's largest magnitude. It keeps ``zero`` within 2048, where float16 still resolves
half a step, so that a vector with hardly any spread around a large offset keeps its values."""

MAX_ZERO = 1 / MIN_RELATIVE_STEP

MIN_STEP = 2.0**-24
"""Smallest positive float16: the step of an all-zero vector, which any positive step stores exactly."""

MAX_STEP = 65504.0
"""Largest float16. Values beyond +-8e6 would need more, and are clamped."""


def choose_range(low: Tensor, high: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Pick the grid ``scale * (code - zero)``, code 0 to ``levels``, for values between ``low`` and ``high``.

    Both numbers are float16 because they are stored so; codes are taken on the rounded grid, so that this rounding
    costs no accuracy. The kernels repeat this arithmetic operation by operation: products, sums and quotients rounded
    to nearest in float32, none fused.

    Args:
        low: smallest value of each vector, float32, finite.
        high: largest value of each vector, float32, finite, same shape.
        levels: highest code, 255 or 15.

    Returns:
        scale: same shape, float16, positive. Rounded up, so that all steps together always reach.
        zero: same shape, float16: the real, unrounded level that stands for 0.0.
    """
    share = 1.0 / levels
    # Scaled before subtracting: the difference of the two ends may overflow where neither end does.
    step = high * share - low * share
    wanted = torch.maximum(step, torch.maximum(high, -low) * MIN_RELATIVE_STEP).clamp(MIN_STEP, MAX_STEP)
    scale = wanted.half()
    # The next float16 above: positive ones are ordered as their bits.
    scale = torch.where(scale.float() < wanted, (scale.view(torch.int16) + 1).view(torch.float16), scale)
    # Out of these bounds only where the step itself was clamped.
    zero = (-low / scale.float()).clamp(-MAX_ZERO, MAX_ZERO).half()
    return scale, zero


def encode(states: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the last axis of ``states``, one range per vector.

    Args:
        states: [..., D], any float dtype, finite. Read, never written.
        levels: highest code, 255 or 15.

    Returns:
        codes: [..., D] uint8.
        scale: [...] float16.
        zero: [...] float16.
    """
    values = states.float()
    scale, zero = choose_range(values.amin(-1), values.amax(-1), levels)
    inverse = 1.0 / scale.float()
    codes = (values * inverse[..., None] + zero.float()[..., None]).round().clamp(0, levels).to(torch.uint8)
    return codes, scale, zero


def decode(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Recover values: ``scale * (codes - zero)`` in float32, rounded once to ``dtype``.

    Args:
        codes: [..., D] uint8. Read, never written.
        scale: [...], any float dtype.
        zero: [...], dtype of ``scale``.
        dtype: of the result.

    Returns:
        [..., D] in ``dtype``.
    """
    return (scale.float()[..., None] * (codes.float() - zero.float()[..., None])).to(dtype)


def encode_int4(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to 4 bits, one range per 32 neighbouring channels of a vector.

    Args:
        states: [..., D], any float dtype, finite; D a multiple of 32. Read, never written.

    Returns:
        packed: [..., D / 2] uint8, the channel of even place in the low half of a byte.
        scale: [..., D / 32] float16.
        zero: [..., D / 32] float16.
    """
    codes, scale, zero = encode(states.unflatten(-1, (-1, INT4_GROUP)), levels=15)
    flat = codes.flatten(-2)
    return flat[..., 0::2] | flat[..., 1::2] << 4, scale, zero


def decode_int4(packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Recover what ``encode_int4`` stored: [..., D] in ``dtype``."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return decode(codes.unflatten(-1, (-1, INT4_GROUP)), scale, zero, dtype).flatten(-2)


_library = torch.library.Library("qquant", "FRAGMENT")
_library.define("kv_append(Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) zero, Tensor states, int at) -> ()")
_library.define("kv_dequantize(Tensor codes, Tensor scale, Tensor zero, ScalarType dtype) -> Tensor")
_library.define(
    "kv_decode_attention(Tensor query, Tensor k_codes, Tensor k_scale, Tensor k_zero, "
    "Tensor v_codes, Tensor v_scale, Tensor v_zero, Tensor? mask, float scaling) -> Tensor"
)


def append_reference(codes: Tensor, scale: Tensor, zero: Tensor, states: Tensor, at: int) -> None:
    """Quantize ``states`` into a cache's storage, from token ``at`` on.

    Args:
        codes: [B, H, C, D] uint8, C = tokens of room. Written in place at ``at : at + L``, the rest untouched.
        scale: [B, H, C] float16. Written in place likewise.
        zero: [B, H, C] float16. Written in place likewise.
        states: [B, H, L, D] float32, float16 or bfloat16, any strides but the last, which is 1. Read, never written.
        at: first token to write; ``0 <= at`` and ``at + L <= C``.
    """
    _check_append(codes, scale, zero, states, at)
    new_codes, new_scale, new_zero = encode(states)
    place = slice(at, at + states.shape[2])
    codes[:, :, place] = new_codes
    scale[:, :, place] = new_scale
    zero[:, :, place] = new_zero


def dequantize_reference(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Recover a stretch of a cache.

    Args:
        codes: [B, H, T, D] uint8; may be a view into longer storage. Read, never written.
        scale: [B, H, T] float16.
        zero: [B, H, T] float16.
        dtype: float32, float16 or bfloat16.

    Returns:
        [B, H, T, D] in ``dtype``, contiguous.
    """
    return decode(codes, scale, zero, dtype).contiguous()


def attention_reference(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of the last few tokens over a quantized cache, in float32.

    Query i of L sees keys 0 to T - L + i when there is no mask; with a mask it sees what the mask says and nothing
    else. A query that sees no key gives zeros.

    Args:
        query: [B, Hq, L, Dk] float32, float16 or bfloat16; L <= T, Hq a multiple of H (grouped queries).
        k_codes: [B, H, T, Dk] uint8; may be a view into longer storage, as may all that follow.
        k_scale: [B, H, T] float16.
        k_zero: [B, H, T] float16.
        v_codes: [B, H, T, Dv] uint8.
        v_scale: [B, H, T] float16.
        v_zero: [B, H, T] float16.
        mask: [B or 1, 1 or Hq, L, T] bool, true where a key is seen; or None.
        scaling: factor on the scores, 1 / sqrt(Dk) in most models.

    Returns:
        [B, Hq, L, Dv] in the dtype of ``query``.
    """
    _check_attention(query, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, mask)
    batch, heads, length, _ = query.shape
    kv_heads, tokens = k_codes.shape[1], k_codes.shape[2]
    keys = decode(k_codes, k_scale, k_zero, torch.float32)
    values = decode(v_codes, v_scale, v_zero, torch.float32)
    # Query heads that share a KV head are rows of one product: [B, H, heads / H * L, D].
    rows = query.float().reshape(batch, kv_heads, -1, query.shape[-1])
    scores = (rows @ keys.mT * scaling).view(batch, heads, length, tokens)
    seen = visible(length, tokens, query.device) if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf)
    # A row without any key has only -inf: its largest score is replaced, its weights all come out 0.
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    weights = (weights / total).view(batch, kv_heads, -1, tokens)
    return (weights @ values).view(batch, heads, length, values.shape[-1]).to(query.dtype)


def visible(length: int, tokens: int, device: torch.device) -> Tensor:
    """Causal mask of the last ``length`` of ``tokens`` positions: [length, tokens] bool, true where a key is seen."""
    return torch.ones(length, tokens, dtype=torch.bool, device=device).tril(tokens - length)


def _append_fake(codes: Tensor, scale: Tensor, zero: Tensor, states: Tensor, at: int) -> None:
    _check_append(codes, scale, zero, states, at)


def _dequantize_fake(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _attention_fake(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    _check_attention(query, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, mask)
    return query.new_empty(*query.shape[:-1], v_codes.shape[-1])


def _check_append(codes: Tensor, scale: Tensor, zero: Tensor, states: Tensor, at: int) -> None:
    batch, heads, room, dim = codes.shape
    torch._check(
        states.dim() == 4 and states.shape[0] == batch and states.shape[1] == heads and states.shape[3] == dim,
        lambda: f"states must be [{batch}, {heads}, L, {dim}] as the cache is, got {list(states.shape)}",
    )
    torch._check(
        scale.shape == codes.shape[:3] and zero.shape == codes.shape[:3],
        lambda: f"scale and zero must be {list(codes.shape[:3])}, got {list(scale.shape)} and {list(zero.shape)}",
    )
    torch._check(
        at >= 0 and at + states.shape[2] <= room,
        lambda: f"tokens {at} to {at + states.shape[2]} must fit into the cache's room of {room}",
    )


def _check_attention(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
) -> None:
    batch, heads, length, dim = query.shape
    kv_heads, tokens = k_codes.shape[1], k_codes.shape[2]
    torch._check(
        k_codes.shape[0] == batch and k_codes.shape[3] == dim and v_codes.shape[:3] == k_codes.shape[:3],
        lambda: f"cache {list(k_codes.shape)}, {list(v_codes.shape)} does not fit the query {list(query.shape)}",
    )
    torch._check(heads % kv_heads == 0, lambda: f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    torch._check(length <= tokens, lambda: f"{length} queries need at least as many keys, got {tokens}")
    for name, numbers in (("k_scale", k_scale), ("k_zero", k_zero), ("v_scale", v_scale), ("v_zero", v_zero)):
        torch._check(
            numbers.shape == k_codes.shape[:3],
            lambda name=name, numbers=numbers: f"{name} must be {list(k_codes.shape[:3])}, got {list(numbers.shape)}",
        )
    if mask is not None:
        torch._check(
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, heads)
            and mask.shape[2] == length
            and mask.shape[3] == tokens
            and mask.dtype == torch.bool,
            lambda: (
                f"mask must be [{batch} or 1, {heads} or 1, {length}, {tokens}] bool, "
                f"got {list(mask.shape)} {mask.dtype}"
            ),
        )


for _name, _reference, _fake in (
    ("kv_append", append_reference, _append_fake),
    ("kv_dequantize", dequantize_reference, _dequantize_fake),
    ("kv_decode_attention", attention_reference, _attention_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qquant::{_name}", _fake, lib=_library)

append = torch.ops.qquant.kv_append
"""``append_reference`` by the fastest kernel that is live for the tensors' device."""
dequantize = torch.ops.qquant.kv_dequantize
"""``dequantize_reference`` likewise."""
decode_attention = torch.ops.qquant.kv_decode_attention
"""``attention_reference`` likewise."""

_native.load_torch_ops()
