"""Attention of one new token over keys and values that are bfloat16, on a CPU. Schema, reference, fake, when it serves.

torch's attention reads such a cache at a tenth of the memory's rate. The reference is plain torch and runs anywhere.
How transformers comes to call this is kv_attention.py's; attention over an Int8 cache is kv_ops.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qquant import _native

# Arguments of transformers' attention functions that change the result and that the kernel does not know.
_FOREIGN = ("softcap", "s_aux", "position_bias", "cache")


def decode_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one token in float32, rounded once. A query that sees no key gives zeros.

    Args:
        query: [B, Hq, 1, Dk] of a float dtype, Hq a multiple of H. Read, never written, as all that follows.
        key: [B, H, T, Dk] in the query's dtype.
        value: [B, H, T, Dv] in the query's dtype.
        mask: [B or 1, Hq or 1, 1, T] bool, true where a key is seen; None: all are.
        scaling: factor on the scores.

    Returns:
        [B, Hq, 1, Dv] in the query's dtype, contiguous.
    """
    check_decode(query, key, value, mask)
    batch, heads = query.shape[:2]
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, query.shape[-1])
    scores = grouped @ key.float().mT * scaling
    scores = scores.view(batch, heads, 1, tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    largest = scores.amax(-1, keepdim=True) if tokens else scores.new_zeros(batch, heads, 1, 1)
    # A row without any key has only -inf: its largest is replaced, its weights all come out 0.
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.masked_fill(total == 0.0, 1.0)).view(batch, kv_heads, heads // kv_heads, tokens)
    return (weights @ value.float()).view(batch, heads, 1, value.shape[-1]).to(query.dtype)


def check_decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Refuse tensors that do not belong together; the kernel checks the same."""
    torch._check(
        query.dim() == key.dim() == value.dim() == 4 and query.shape[2] == 1,
        lambda: f"query must be [B, Hq, 1, D], key and value 4 axes, got {[*map(list, _shapes(query, key, value))]}",
    )
    torch._check(
        query.shape[0] == key.shape[0]
        and key.shape[:3] == value.shape[:3]
        and query.shape[3] == key.shape[3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0,
        lambda: f"query, key and value do not fit one another: {[*map(list, _shapes(query, key, value))]}",
    )
    torch._check(
        query.dtype == key.dtype == value.dtype,
        lambda: f"query, key and value must be of one dtype, got {query.dtype}, {key.dtype}, {value.dtype}",
    )
    if mask is not None:
        batch, heads, tokens = query.shape[0], query.shape[1], key.shape[2]
        torch._check(
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, heads)
            and mask.shape[2:] == (1, tokens)
            and mask.dtype == torch.bool,
            lambda: f"mask must be [{batch} or 1, {heads} or 1, 1, {tokens}] bool, got {list(mask.shape)} {mask.dtype}",
        )


def _shapes(*tensors: Tensor) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _decode_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    check_decode(query, key, value, mask)
    return query.new_empty(*query.shape[:-1], value.shape[-1])


_OPERATOR = "qquant::decode_attention"
_library = torch.library.Library("qquant", "FRAGMENT")
_library.define("decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor")
_library.impl("decode_attention", decode_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_OPERATOR, _decode_fake, lib=_library)

decode_attention = torch.ops.qquant.decode_attention.default
"""``decode_reference`` by the fastest kernel that is live for the tensors' device."""

_native.load_torch_ops()


@torch.compiler.assume_constant_result
def kernel_is_live() -> bool:
    """Whether a compiled kernel serves the operator on this CPU; it is written for AVX-512.

    Raises:
        UsageError: QQUANT_CPU_ISA names no instruction set.
    """
    return _kernel_is_live()


@cache
def _kernel_is_live() -> bool:
    built = torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU")
    return built and bool(_native.answer("decode_attention_is_here"))


def serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether the kernel takes this call of an attention function of transformers.

    Args:
        query: [B, Hq, L, D].
        key: [B, H, T, D].
        value: [B, H, T, D].
        mask: as transformers prepared it for scaled dot product attention.
        options: all other arguments.
    """
    return (
        kernel_is_live()
        and query.shape[2] == 1
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[2:] == (1, key.shape[2])))
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not options.get("dropout")
        and all(options.get(name) is None for name in _FOREIGN)
    )


def takes(options: Mapping[str, Any]) -> bool:
    """Whether the kernel knows all options of a call that change the result."""
    return kernel_is_live() and not options.get("dropout") and all(options.get(name) is None for name in _FOREIGN)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, None]:
    """What transformers wants of attention: [B, 1, Hq, D], contiguous, and no weights."""
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found: Tensor = decode_attention(query, key, value, mask, scaling)
    # One token: [B, Hq, 1, D] and [B, 1, Hq, D] are the same numbers in the same order.
    return found.view(found.shape[0], 1, found.shape[1], found.shape[3]), None
