"""The GPTQ on-disk layout of one linear layer: codes, zeros and grids in int32 words, and back.

``docs/checkpoint-format.md`` is the normative description. Names of files and keys of config.json live in
checkpoint.py; nothing here knows of models or files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.errors import UsageError

WORD_BITS = 32


PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""What a packed linear is stored as: the last parts of its tensors' names."""


def period(bits: int) -> tuple[int, int]:
    """How many codes fill how many whole int32 words: (8, 1) for 4 bits; 3-bit codes straddle words: (32, 3)."""
    return (WORD_BITS, bits) if WORD_BITS % bits else (WORD_BITS // bits, 1)


def packable(rows: int, columns: int, bits: int) -> bool:
    """Whether a [columns, rows] linear fits the format: both sides fill whole words."""
    per = period(bits)[0]
    return rows % per == 0 and columns % per == 0


def in_order(columns: int, size: int, device: torch.device | str) -> Tensor:
    """The g_idx of groups of ``size`` neighbours in the original order; only act-order differs: [columns] int32."""
    return torch.arange(columns, dtype=torch.int32, device=device) // size


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the rows (input features), lowest bits first.

    Args:
        codes: [K, N] integer, 0 .. 2**bits - 1. K must fill whole words (see ``period``). Read, never written.
        bits: 2, 3, 4 or 8.

    Returns:
        [K * bits / 32, N] int32.

    Raises:
        UsageError: K does not fill whole words.

    Source: layout of the AutoGPTQ checkpoints; 3-bit codes form one little-endian stream over three words.
    """
    rows, columns = codes.shape
    per, words = period(bits)
    if rows % per:
        raise UsageError(f"a {bits}-bit GPTQ tensor needs a multiple of {per} packed rows, got {rows}")
    groups = codes.to(torch.int32).reshape(rows // per, per, columns)
    packed = torch.zeros(rows // per, words, columns, dtype=torch.int32, device=codes.device)
    for position in range(per):
        word, shift = divmod(position * bits, WORD_BITS)
        packed[:, word] |= groups[:, position] << shift
        if shift + bits > WORD_BITS:
            packed[:, word + 1] |= groups[:, position] >> (WORD_BITS - shift)
    return packed.reshape(rows // per * words, columns)


def unpack_codes(qweight: Tensor, bits: int, rows: int | None = None) -> Tensor:
    """Undo ``pack_codes``.

    Args:
        qweight: [K * bits / 32, N] int32. Read, never written.
        bits: 2, 3, 4 or 8.
        rows: K, if the last word is only partly used; None: all that the words hold.

    Returns:
        [K, N] uint8.
    """
    per, words = period(bits)
    count, columns = qweight.shape
    if count % words:
        raise UsageError(f"{bits}-bit words come in sets of {words}, got {count}")
    packed = qweight.reshape(count // words, words, columns)
    codes = torch.empty(count // words, per, columns, dtype=torch.uint8, device=qweight.device)
    mask = 2**bits - 1
    for position in range(per):
        word, shift = divmod(position * bits, WORD_BITS)
        value = packed[:, word] >> shift
        if shift + bits > WORD_BITS:
            low_bits = WORD_BITS - shift
            value = (value & (2**low_bits - 1)) | (packed[:, word + 1] << low_bits)
        codes[:, position] = value & mask
    return codes.reshape(-1, columns)[:rows]


def pack_zeros(zeros: Tensor, bits: int, version: int = 1) -> Tensor:
    """Pack zeros along the columns (output features); v1 stores ``zero - 1``, v2 stores ``zero``.

    Args:
        zeros: [G, N] integer-valued; v1 takes 1 .. 2**bits - 1, v2 also 0. Read, never written.
        bits: 2, 3, 4 or 8.
        version: 1 (``gptq``) or 2 (``gptq_v2``).

    Returns:
        [G, N * bits / 32] int32.

    Raises:
        UsageError: a zero lies outside what the version can store.
    """
    stored = zeros.to(torch.int32) - (1 if version == 1 else 0)
    if stored.numel() and (int(stored.min()) < 0 or int(stored.max()) > 2**bits - 1):
        raise UsageError(
            f"zeros of a v{version} file must lie in {2 - version} .. {2**bits - 1}, "
            f"got {int(zeros.min())} .. {int(zeros.max())}"
        )
    return pack_codes(stored.T, bits).T.contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, columns: int | None = None, version: int = 1) -> Tensor:
    """Undo ``pack_zeros``.

    v1's one is added to whole words with carry (2, 4, 8 bits), which also undoes the borrow of writers that subtract
    it that way.

    Args:
        qzeros: [G, N * bits / 32] int32. Read, never written.
        bits: 2, 3, 4 or 8.
        columns: N, if the last word is only partly used.
        version: 1 or 2.

    Returns:
        [G, N] int32, 0 .. 2**bits - 1.
    """
    words = qzeros.T.contiguous()
    if version == 2:
        return unpack_codes(words, bits, columns).T.to(torch.int32)
    if WORD_BITS % bits:  # a 3-bit field straddles words, so its one can only be added to the field itself
        fields: Tensor = unpack_codes(words, bits, columns).T.to(torch.int32) + 1
        return fields.bitwise_and_(2**bits - 1)
    ones = pack_codes(torch.ones(WORD_BITS // bits, 1, dtype=torch.int32, device=qzeros.device), bits)
    return unpack_codes(words + ones, bits, columns).T.to(torch.int32)


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int, version: int = 1
) -> Tensor:
    """The real weights of a packed linear: ``scales[g] * (code - zero[g])`` with g = g_idx[row].

    Args:
        qweight: [K * bits / 32, N] int32.
        qzeros: [G, N * bits / 32] int32.
        scales: [G, N] floating.
        g_idx: [K] integer, group of each input row.
        bits: 2, 3, 4 or 8.
        version: 1 if qzeros hold ``zero - 1``, 2 if they hold ``zero``.

    Returns:
        [K, N] float32: the transpose of a Linear's weight.
    """
    codes = unpack_codes(qweight, bits, g_idx.numel())
    zeros = unpack_zeros(qzeros, bits, scales.shape[1], version).to(torch.float32)
    scales = scales.to(torch.float32)
    rows, groups = codes.shape[0], scales.shape[0]
    if rows % groups == 0 and torch.equal(g_idx.to(torch.int32), in_order(rows, rows // groups, g_idx.device)):
        grouped: Tensor = codes.reshape(groups, rows // groups, -1).to(torch.float32)
        result: Tensor = grouped.sub_(zeros[:, None]).mul_(scales[:, None]).reshape(rows, -1)
        return result
    index = g_idx.long()
    return (codes.to(torch.float32) - zeros[index]) * scales[index]
