"""torch's own packed kernels for linears: what they can read, the copies they read, and their calls.

They serve where our kernels are not built, and whoever asks for them. A copy lies beside the checkpoint's tensors; when
it is made and dropped is linear.py's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INT4_GROUPS = (32, 64, 128, 256)
"""Columns of a group that torch's int4 kernels know."""

_INNER_K_TILES = 8
"""How the CUDA kernel's words are cut, see ``torch.ops.aten._convert_weight_to_int4pack``."""

Product = Callable[[Tensor], Tensor]
"""[..., K] -> [..., N] in x's dtype, without the bias."""


def obstacle(
    *, bits: int, group_size: int, columns: int, rows: int, device: str, ordered: bool, one_zero: int | None
) -> str:
    """Why torch's kernels cannot read a layer; empty if they can.

    Args:
        bits: of a code.
        group_size: columns of a group.
        columns: input features.
        rows: output features.
        device: type of the layer's device.
        ordered: whether groups are neighbours in the original order.
        one_zero: the zero of all groups, None if they differ.
    """
    if not ordered:
        return "and it knows no act-order"
    if bits == 4:
        if group_size not in INT4_GROUPS or columns % group_size:
            return f"and its groups are of {', '.join(map(str, INT4_GROUPS))} columns, this layer's of {group_size}"
        step = 16 if device == "cpu" else 8
        if rows % step:
            return f"and it needs a multiple of {step} outputs, this layer has {rows}"
        if device != "cpu" and columns % (16 * _INNER_K_TILES):
            return f"and on {device} it needs a multiple of {16 * _INNER_K_TILES} inputs, this layer has {columns}"
        return ""
    if bits == 8:
        whole = group_size >= columns and one_zero == 128
        return "" if whole else "and its int8 has one scale per row and codes around zero"
    return f"and it has none for {bits} bits"


def int4_product(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Product:
    """Torch's int4 kernel over a copy of a layer.

    Args:
        codes: [K, N] uint8, 0..15. Read, never written.
        scales: [G, N] floating.
        zeros: [G, N] integer.
        group_size: columns of a group.
    """
    real = scales.float()
    # The kernel computes (code - 8) * scale + shift, both in bfloat16.
    grid = torch.stack([real, (8 - zeros.float()) * real], dim=-1).to(torch.bfloat16).contiguous()
    if codes.device.type == "cpu":
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.T.to(torch.int32).contiguous(), 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = codes.T.contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(
            (pairs[:, ::2] << 4 | pairs[:, 1::2]).contiguous(), _INNER_K_TILES
        )
        multiply = torch.ops.aten._weight_int4pack_mm

    def product(x: Tensor) -> Tensor:
        found: Tensor = multiply(x.reshape(-1, x.shape[-1]).contiguous(), words, group_size, grid)
        return found.reshape(*x.shape[:-1], found.shape[-1])

    return product


def int8_product(codes: Tensor, scales: Tensor) -> Product:
    """Torch's int8 kernel over a copy of a layer with one scale per row.

    Args:
        codes: [K, N] uint8; 128 stands for zero. Read, never written.
        scales: [1, N] floating.
    """
    signed = (codes.T.to(torch.int16) - 128).to(torch.int8).contiguous()
    grid = scales[0].to(torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        found: Tensor = torch.ops.aten._weight_int8pack_mm(flat, signed, grid)
        return found.reshape(*x.shape[:-1], found.shape[-1])

    return product
