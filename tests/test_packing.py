"""Packing must be exact, whatever the width, and refuse what the format cannot hold."""

from __future__ import annotations

import pytest
import torch

from qquant.errors import UsageError
from qquant.packing import dequantize, pack_codes, pack_zeros, packable, period, unpack_codes, unpack_zeros

BITS = (2, 3, 4, 8)


def random_codes(shape: tuple[int, int], bits: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 2**bits, shape, generator=torch.Generator().manual_seed(bits))


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """One little-endian bit stream, cut into signed 32-bit words: the format's definition, one bit at a time."""
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", BITS)
def test_packed_words_are_one_little_endian_bit_stream(bits: int) -> None:
    codes = random_codes((96, 5), bits)
    packed = pack_codes(codes, bits)
    for column in range(5):
        assert packed[:, column].tolist() == pack_bit_by_bit(codes[:, column].tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_undoes_packing(bits: int) -> None:
    codes = random_codes((64, 40), bits)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits).long(), codes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_survive_the_round_trip(bits: int, version: int) -> None:
    zeros = random_codes((3, 64), bits, low=2 - version)
    packed = pack_zeros(zeros, bits, version)
    assert torch.equal(unpack_zeros(packed, bits, 64, version).long(), zeros)


def test_symmetric_int4_v1_zeros_are_the_words_every_reader_knows() -> None:
    packed = pack_zeros(torch.full((2, 16), 8), 4, version=1)
    assert (packed == 0x77777777).all()


def test_v1_borrow_of_whole_word_writers_is_undone() -> None:
    zeros = random_codes((4, 32), 4)
    assert (zeros == 0).any()
    whole_word = pack_zeros(zeros, 4, version=2) - 0x11111111
    assert torch.equal(unpack_zeros(whole_word, 4, 32, version=1).long(), zeros)


def test_v1_refuses_a_zero_it_cannot_store() -> None:
    with pytest.raises(UsageError, match=r"1 \.\. 15"):
        pack_zeros(torch.zeros(1, 8), 4, version=1)


def test_rows_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        pack_codes(torch.zeros(12, 8), 4)
    assert not packable(172, 64, 4)
    assert packable(176, 64, 4)
    assert period(3) == (32, 3)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_follows_the_formula_with_scattered_groups(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes, zeros = random_codes((64, 32), bits), random_codes((4, 32), bits, low=1)
    scales = (torch.rand(4, 32, generator=generator) - 0.5).half()  # of either sign
    g_idx = torch.randint(0, 4, (64,), generator=generator).int()
    got = dequantize(pack_codes(codes, bits), pack_zeros(zeros, bits), scales, g_idx, bits=bits)
    expected = torch.empty(64, 32)
    for k in range(64):
        group = int(g_idx[k])
        expected[k] = scales[group].float() * (codes[k] - zeros[group]).float()
    assert torch.equal(got, expected)
