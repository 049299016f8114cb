"""TokenStore: quantized vectors of consecutive tokens in storage that grows in steps and is never concatenated.

One store holds the keys or the values of one layer. It knows nothing of attention, models or transformers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from qquant import _native, kv_ops
from qquant.kv_ops import KVBits

KVScheme = Literal["token", "qwen"]

STEP = 64
"""Room that is not reserved is a multiple of this many tokens."""

GROWTH = 32
"""A full store grows by one part in this many, so that room not yet used stays near 3 %."""

LARGE_BYTES = 4 << 20
"""Storage from this size on is worth large pages of 2 MB."""

RESERVE_AHEAD = 1024
"""Tokens of room beyond the first call that are taken at once when the final length is known."""


class TokenStore:
    """Codes, scales and zeros of ``[batch, heads, tokens]`` vectors of ``dim`` channels.

    Growing copies one store at a time, so that the peak of a model with many layers is one cache and a small part,
    not two caches as with concatenation.

    Args:
        states: [B, H, L, D], the first vectors; only shape, dtype and device are read.
        scheme: ``token`` or ``qwen``, see ``kv_cache_quant.quantize_cache_v``.
        bits: of a code, 8 or 4. In 4 bits every 32 channels have a range of their own and two codes share a byte.
        reserve: tokens the store will probably hold in the end; 0 if unknown.
    """

    def __init__(self, states: Tensor, *, scheme: KVScheme = "token", bits: KVBits = 8, reserve: int = 0) -> None:
        batch, heads, length, dim = states.shape
        room = max(_whole_steps(length), min(reserve, length + RESERVE_AHEAD))
        self.scheme: KVScheme = scheme
        self.bits: KVBits = bits
        self.tokens = 0
        """Vectors held per head."""
        # The published scheme keeps its ranges in the dtype of the states.
        dtype = torch.float16 if scheme == "token" else states.dtype
        groups = () if bits == 8 else (dim // kv_ops.INT4_GROUP,)
        self.codes = _fresh(torch.empty(batch, heads, room, dim * bits // 8, dtype=torch.uint8, device=states.device))
        self.scale = torch.empty(batch, heads, room, *groups, dtype=dtype, device=states.device)
        self.zero = torch.empty_like(self.scale)

    @property
    def room(self) -> int:
        """Tokens that fit without growing."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the store holds, room not yet used included."""
        return sum(part.untyped_storage().nbytes() for part in self._parts())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the vectors held, without the room ahead."""
        return sum(part[:, :, : self.tokens].numel() * part.element_size() for part in self._parts())

    def append(self, states: Tensor, *, kernel: bool = True) -> None:
        """Quantize ``states`` [B, H, L, D] behind what is held. Read, never written."""
        end = self.tokens + states.shape[2]
        if end > self.room:
            self._move(0, self.tokens, _whole_steps(max(end, self.room + self.room // GROWTH)))
        if self.scheme == "qwen" or self.bits == 4:
            place = slice(self.tokens, end)
            encode = encode_as_qwen if self.scheme == "qwen" else kv_ops.encode_int4
            self.codes[:, :, place], self.scale[:, :, place], self.zero[:, :, place] = encode(states)
        elif kernel:
            kv_ops.append(self.codes, self.scale, self.zero, states, self.tokens)
        else:
            kv_ops.append_reference(self.codes, self.scale, self.zero, states, self.tokens)
        self.tokens = end

    def last(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The newest ``count`` vectors: views of codes, scale and zero.

        [B, H, count, D] uint8, [B, H, count] and [B, H, count]; in 4 bits [B, H, count, D / 2], [B, H, count, D / 32].
        """
        place = slice(self.tokens - count, self.tokens)
        return self.codes[:, :, place], self.scale[:, :, place], self.zero[:, :, place]

    def drop_newest(self, count: int) -> None:
        """Forget the newest ``count`` vectors; no data moves."""
        self.tokens = max(0, self.tokens - count)

    def keep_newest(self, count: int, *, room: int) -> None:
        """Forget all but the newest ``count`` vectors and move them into fresh storage with at least ``room``."""
        if self.tokens > count:
            self._move(self.tokens - count, count, _whole_steps(max(count, room)))

    def select(self, rows: Tensor) -> None:
        """Make the batch consist of the given rows: ``rows`` [new batch] int64, repetitions allowed."""
        for name in ("codes", "scale", "zero"):
            part: Tensor = getattr(self, name)
            chosen = _fresh(part.new_empty(rows.numel(), *part.shape[1:]))
            held = chosen[:, :, : self.tokens]
            held.copy_(part[:, :, : self.tokens].index_select(0, rows.to(part.device)))
            setattr(self, name, chosen)

    def to(self, device: torch.device | str) -> None:
        """Move everything to another device."""
        self.codes, self.scale, self.zero = (part.to(device, non_blocking=True) for part in self._parts())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.zero

    def _move(self, begin: int, count: int, room: int) -> None:
        """Copy ``count`` vectors from ``begin`` on to the front of fresh storage, one part after the other."""
        for name in ("codes", "scale", "zero"):
            old: Tensor = getattr(self, name)
            new = _fresh(old.new_empty(*old.shape[:2], room, *old.shape[3:]))
            new[:, :, :count] = old[:, :, begin : begin + count]
            setattr(self, name, new)
        self.tokens = count


def encode_as_qwen(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published scheme: one range per head over all tokens of this call, truncated, in the dtype of ``states``.

    Args:
        states: [B, H, L, D], any float dtype.

    Returns:
        codes [B, H, L, D] uint8, scale and zero [B, H, L] in the dtype of ``states``.
    """
    batch, heads, tokens, _ = states.shape
    if states.numel() == 0:
        empty = states.new_empty(batch, heads, tokens)
        return torch.empty_like(states, dtype=torch.uint8), empty, empty.clone()
    # Over L and D together: [B, H, 1, 1].
    low = states.amin(dim=(2, 3), keepdim=True)
    high = states.amax(dim=(2, 3), keepdim=True)
    scale = (high - low) / kv_ops.LEVELS
    zero = 0 - low / scale
    codes = (states / scale + zero).clamp(0, kv_ops.LEVELS).to(torch.uint8)
    return codes, scale[..., 0].expand(-1, -1, tokens), zero[..., 0].expand(-1, -1, tokens)


def hadamard(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthogonal matrix [dim, dim] float32 of Hadamard blocks, as large as the powers of two in ``dim`` allow.

    Source: Sylvester's construction; its use on q and k after RoPE: QuaRot, arXiv:2404.00456, section 4.
    """
    block = dim & -dim
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks: Tensor = torch.block_diag(*[matrix / math.sqrt(block)] * (dim // block))
    return blocks.to(device)


def _fresh(tensor: Tensor) -> Tensor:
    """The same tensor, whose memory nobody has touched yet, in large pages where the system grants them.

    Reading a cache of many megabytes in pages of 4 KB, a core waits for page tables more than for memory.
    """
    host = _native.host()
    if host is not None and tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES:
        host.prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _whole_steps(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
